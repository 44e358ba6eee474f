"""Several Ray nodes with addresses of their own: trained across, one killed, one cut off; the result is the right one.

The head node has the driver and no worker; two further nodes have room for one worker each. All of them share a disk,
so that a node that is cut off can still write there.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.e2e.cluster import Node, PrivateRay, further_node, private_ray
from tests.e2e.network import Host, network, no_network
from tests.e2e.training import (
    EVERY,
    PATIENCE_S,
    STEPS,
    Training,
    assert_close,
    assert_same,
    workers_of,
    write_images,
)

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
# Ray asks each node every three seconds whether it lives, and waits ten for an answer, five times.
SOONER = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
GOES_ON = "going on from the last checkpoint with 1 of 2 workers"


@dataclass
class Machines:
    """A head node and two others, which are started again as often as they are lost."""

    ray: PrivateRay
    home: Path
    hosts: list[Host]
    stack: ExitStack
    nodes: dict[str, Node] = field(default_factory=dict)  # by address

    def start(self) -> None:
        """Have all of the nodes up."""
        for host in self.hosts:
            if host.address not in self.nodes:
                self.nodes[host.address] = self.stack.enter_context(further_node(self.ray, 1, host))

    def lose(self, node: Node) -> None:
        """End what is left of a node; the next start begins another one there."""
        node.kill()
        del self.nodes[node.host.address]

    def of_rank(self, training: Training, rank: int) -> Node:
        """The node of rank 0, or of the other one."""
        (holder,) = training.checkpoints.glob("holder-*.json")
        first = json.loads(holder.read_text())["pid"]
        (node,) = [one for one in self.nodes.values() if (first in workers_of(one.process.pid)) == (rank == 0)]
        return node

    def workers(self, node: Node) -> list[int]:
        """Process ids of a node's training workers."""
        return workers_of(node.process.pid)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The head node alone."""
    if reason := no_network():
        pytest.skip(reason)
    home = tmp_path_factory.mktemp("home")
    write_images(home)
    with network(3) as (head, *hosts), private_ray(home, 0, head, SOONER) as ray, ExitStack() as stack:
        yield Machines(ray, home, hosts, stack)


@pytest.fixture(scope="module")
def whole(machines: Machines) -> Training:
    """The run that nobody disturbs, on one machine."""
    training = Training(machines.ray, machines.home, "whole")
    with further_node(machines.ray, 2, machines.hosts[0]):
        training.ends(training.start())
    assert len(training.losses()) == STEPS // 2
    return training


def begun(machines: Machines, name: str) -> tuple[Training, subprocess.Popen[bytes]]:
    """A run that goes on with one worker if need be, as far as its first checkpoint."""
    machines.start()
    training = Training(machines.ray, machines.home, name, ("cluster.min_workers=1",))
    process = training.start()
    training.until(process, lambda: training.saved() >= EVERY)
    assert [len(machines.workers(node)) for node in machines.nodes.values()] == [1, 1]
    return training, process


def test_two_machines_train_what_one_does(machines: Machines, whole: Training) -> None:
    training, process = begun(machines, "across")
    training.ends(process)
    assert_same(training, whole)


def test_run_survives_the_loss_of_a_machine(machines: Machines, whole: Training) -> None:
    training, process = begun(machines, "killed")
    machines.lose(machines.of_rank(training, 1))
    training.until(process, lambda: GOES_ON in training.log)
    training.ends(process)
    assert_close(training, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_run_survives_a_machine_that_is_cut_off_and_comes_back(machines: Machines, whole: Training, rank: int) -> None:
    training, process = begun(machines, f"cut-{rank}")
    node = machines.of_rank(training, rank)
    lost = machines.workers(node)
    node.host.cut()
    training.until(process, lambda: GOES_ON in training.log)
    stopped = training.saved()
    training.until(process, lambda: training.saved() > stopped)
    node.host.mend()
    training.ends(process)
    assert_close(training, whole)
    assert training.log.count("going on") == 1, "nothing disturbed it when the machine came back"
    end = time.monotonic() + PATIENCE_S
    while any(map(psutil.pid_exists, lost)):
        assert time.monotonic() < end, "who was cut off ends, too"
        time.sleep(0.5)
    machines.lose(node)
