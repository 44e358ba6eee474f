"""Workers, drivers and nodes that are really terminated or killed: nothing is lost, and nothing done otherwise.

Each run is `python jobs/train_bct.py` on a private Ray of two nodes with room for one worker each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.workers.foreman import LOOK_S
from tests.e2e.cluster import BIN, Node, PrivateRay, further_node, node_ids, private_ray
from tests.e2e.training import EVERY, STEPS, Training, assert_close, assert_same, workers_of, write_images
from tests.faults import Fault, environment

SAVED = "the workers stopped after a checkpoint; going on from the last checkpoint"
pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


@dataclass
class Cluster:
    """Two nodes, and the home of what runs on them."""

    ray: PrivateRay
    home: Path
    nodes: ExitStack
    second: Node = field(init=False)
    second_id: str = field(init=False)

    def grow(self) -> None:
        """Add the second node, and wait until it has joined."""
        before = node_ids(self.ray)
        self.second = self.nodes.enter_context(further_node(self.ray))
        (self.second_id,) = node_ids(self.ray) - before

    def drain(self) -> None:
        """Tell Ray that the second node will be taken away, as a cloud's agent does."""
        command = [str(BIN / "ray"), "drain-node", f"--address={self.ray.gcs}", f"--node-id={self.second_id}"]
        command += [
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            "--deadline-remaining-seconds=300",
        ]
        subprocess.run(command, check=True, env=self.ray.environment, capture_output=True)

    def workers(self) -> list[int]:
        """Process ids of the training workers, of both nodes."""
        sessions = (self.ray.session, self.second.process.pid)
        return [pid for session in sessions for pid in workers_of(session)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step is done meanwhile, nor until the driver has looked at the nodes again, however fast they are."""
        workers = self.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        yield
        time.sleep(3 * LOOK_S)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    write_images(home)
    with private_ray(home, cpus=1) as ray, ExitStack() as nodes:
        cluster = Cluster(ray, home, nodes)
        cluster.grow()
        yield cluster


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Training:
    """The run that nobody interrupts."""
    training = Training(cluster.ray, cluster.home, "whole")
    training.ends(training.start())
    assert len(training.losses()) == STEPS // 2
    return training


def test_terminated_driver_saves_and_says_resume_me_and_a_killed_one_goes_on(cluster: Cluster, whole: Training) -> None:
    training = Training(cluster.ray, cluster.home, "driver")
    process = training.start()
    training.until(process, lambda: training.saved() >= EVERY)
    process.send_signal(signal.SIGTERM)
    training.ends(process, 75)
    assert "stopped: v1: told to end (SIGTERM); the workers stopped after a checkpoint" in training.log
    stopped, run = training.saved(), training.run()
    assert EVERY <= stopped < STEPS
    assert run.info.status == "KILLED"

    refused = training.start("generations.v1.training.steps=9", "generations.v1.margin.m3=0.3")
    training.ends(refused, 2)
    assert f"training.steps (was {STEPS}, now 9)" in training.log
    assert "margin.m3 (was 0.2, now 0.3)" in training.log
    assert training.saved() == stopped

    process = training.start()
    training.until(process, lambda: training.saved() > stopped)
    process.kill()
    process.wait()
    assert training.saved() < STEPS
    training.ends(training.start())
    assert training.run().info.run_id == run.info.run_id
    assert_same(training, whole)


def test_terminated_worker_has_all_save_and_a_killed_one_is_replaced(cluster: Cluster, whole: Training) -> None:
    training = Training(cluster.ray, cluster.home, "worker")
    process = training.start()
    training.until(process, lambda: training.saved() >= EVERY)
    os.kill(cluster.workers()[1], signal.SIGTERM)
    training.until(process, lambda: SAVED in training.log)
    stopped = training.saved()
    training.until(process, lambda: training.saved() > stopped)
    os.kill(cluster.workers()[0], signal.SIGKILL)
    training.until(process, lambda: "workers failed (" in training.log)
    training.ends(process)
    assert_same(training, whole)


def test_run_leaves_a_node_that_will_go_takes_a_new_one_and_survives_its_loss(
    cluster: Cluster, whole: Training
) -> None:
    training = Training(cluster.ray, cluster.home, "node", ("cluster.min_workers=1",))
    process = training.start()
    training.until(process, lambda: training.saved() >= EVERY)
    with cluster.held():
        cluster.drain()
    training.until(process, lambda: f"{SAVED} with 1 of 2" in training.log)
    left = training.saved()
    cluster.second.kill()
    training.until(process, lambda: training.saved() > left)
    with cluster.held():
        cluster.grow()
    training.until(process, lambda: f"{SAVED} with 2 of 2" in training.log)
    grown = training.saved()
    assert grown % EVERY == 0, "nothing was in a hurry"
    training.until(process, lambda: training.saved() > grown)
    cluster.second.kill()
    training.until(process, lambda: "workers failed" in training.log)
    training.ends(process)
    assert training.log.count("with 1 of 2 workers") == 2
    assert_close(training, whole)


def test_torchrun_comes_to_the_same_weights_as_ray(cluster: Cluster, whole: Training) -> None:
    training = Training(cluster.ray, cluster.home, "torchrun")
    training.launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--local-ranks-filter=0"]
    training.ends(training.start())
    assert_same(training, whole)


def test_driver_that_is_killed_around_the_registration_completes_it(cluster: Cluster, whole: Training) -> None:
    faults = [Fault("kill", "before register"), Fault("kill", "after register")]
    training = Training(cluster.ray, cluster.home, "registered", ("cluster.min_workers=1",))
    training.variables = environment(faults, cluster.home / "faults")
    for code in (-signal.SIGKILL, -signal.SIGKILL, 0):
        training.ends(training.start(), code)
    versions = training.client.search_model_versions("name='registered'")
    assert [version.tags["generation"] for version in versions] == ["v1"]
    assert training.run().info.status == "FINISHED"
    assert_close(training, whole)


def test_too_few_nodes_are_told_before_workers_are_asked_and_waited_for_in_a_run(cluster: Cluster) -> None:
    cluster.second.kill()  # it is gone already, unless this test runs alone
    while len(node_ids(cluster.ray)) > 1:  # bounded by pytest's timeout
        time.sleep(0.5)
    few = Training(cluster.ray, cluster.home, "few")
    few.ends(few.start(), 2)
    assert (
        "2 workers of 1 CPU are needed, but the Ray cluster's 1 node has 1 CPU (at most 1 on one): room for" in few.log
    )
    cluster.grow()
    process = few.start("cluster.nodes_wait_s=1")
    few.until(process, lambda: few.saved() >= EVERY)
    cluster.second.kill()
    few.ends(process, 75)
    assert "have room for 1 workers, and 2 are needed (waited cluster.nodes_wait_s=1)" in few.log
