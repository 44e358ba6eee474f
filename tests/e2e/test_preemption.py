"""Workers, drivers and nodes that are really terminated or killed: nothing is lost, and nothing done otherwise.

Each run is `python jobs/train_bct.py` on a private Ray of two nodes with room for one worker each.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline.data.finishing import write_data_set
from pipeline.data.sources import Sample
from pipeline.identities import IdentityTable
from pipeline.workers.foreman import LOOK_S
from tests.e2e.cluster import BIN, Node, PrivateRay, further_node, private_ray, processes

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
SAVED = "the workers stopped after a checkpoint; going on from the last checkpoint"
pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


IDS = """
import sys
from ray._raylet import GcsClient
print(*(key.hex() for key, node in GcsClient(address=sys.argv[1]).get_all_node_info().items() if node.state == 0))
"""


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
        while not (before := self.node_ids()):  # two that start at once take each other's sockets
            time.sleep(0.5)
        self.second = self.nodes.enter_context(further_node(self.ray))
        while not (new := self.node_ids() - before):
            assert self.second.process.poll() is None, "the second node did not start"
        (self.second_id,) = new

    def node_ids(self) -> set[str]:
        """Ids of the nodes that are up."""
        command = [sys.executable, "-c", IDS, self.ray.gcs]
        return set(subprocess.check_output(command, env=self.ray.environment, text=True).split())

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
        every = (pid for session in sessions for pid in processes(session))
        return [pid for pid in every if title(pid).startswith("ray::RayTrainWorker")]

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


def title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    rng, table = np.random.default_rng(1), IdentityTable(tuple(f"id-{number}" for number in range(10)))
    images = (Sample(f"s{n:03d}", drawn(rng, n % 10), "png", f"id-{n % 10}", {}) for n in range(160))
    write_data_set(home / "data" / "train", "made by hand", table, [list(images)])
    with private_ray(home, cpus=1) as ray, ExitStack() as nodes:
        cluster = Cluster(ray, home, nodes)
        cluster.grow()
        yield cluster


def drawn(rng: np.random.Generator, identity: int) -> bytes:
    """An image of noise around the identity's own grey."""
    pixels = rng.integers(0, 100, (32, 32), dtype=np.uint8) + np.uint8(15 * identity)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@dataclass
class Training:
    """A run of one generation, by the same command each time."""

    cluster: Cluster
    name: str
    settings: tuple[str, ...] = ()
    launcher: list[str] = field(default_factory=lambda: [sys.executable])

    @property
    def log(self) -> str:
        return (self.cluster.home / f"{self.name}.log").read_text()

    @property
    def checkpoints(self) -> Path:
        return self.cluster.home / "runs" / self.name / "training" / "v1" / "checkpoints"

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        config = self.cluster.home / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        command = [*self.launcher, "jobs/train_bct.py", "--config", str(config)]
        command += [f"name={self.name}", *self.settings, *overrides]
        environment = {**self.cluster.ray.environment, "RAY_ADDRESS": self.cluster.ray.gcs}
        with (self.cluster.home / f"{self.name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def saved(self) -> int:
        """Steps of the newest checkpoint."""
        complete = [path.parent.name for path in self.checkpoints.glob("step-????????/checkpoint.json")]
        return max((int(name.removeprefix("step-")) for name in complete), default=0)

    def until(self, process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
        """Wait for something while the run goes on."""
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert process.poll() is None, f"ended too early:\n{self.log}"
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    def ends(self, process: subprocess.Popen[bytes], code: int = 0) -> None:
        try:
            assert process.wait(PATIENCE_S) == code, self.log
        finally:
            process.kill()

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.cluster.home / 'mlflow' / 'mlflow.db'}")

    def run(self) -> Run:
        """The one MLflow run of this training."""
        experiment = self.client.get_experiment_by_name(self.name)
        assert experiment is not None
        (run,) = self.client.search_runs([experiment.experiment_id])
        return run

    def losses(self) -> dict[int, list[float]]:
        """All that was ever logged, by step."""
        found: dict[int, list[float]] = {}
        for point in self.client.get_metric_history(self.run().info.run_id, "loss/v1"):
            found.setdefault(point.step, []).append(point.value)
        return found

    def weights(self) -> dict[str, bytes]:
        folder = self.cluster.home / "runs" / self.name / "generations" / "v1"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


STEPS, EVERY = 300, 20
CONFIG = {
    "name": "whole",
    "data": {"source": "none", "train": "data/train", "test": None},
    "preprocess": {"size": 32, "resize": 32, "channels": 1},
    "generations": {
        "v1": {
            "margin": {"name": "cosface", "scale": 20.0, "m3": 0.2},
            "backbone": {"name": "small", "embedding_dim": 16, "width": 8, "depth": 0, "dropout": 0.1},
            "training": {
                "global_batch": 32,
                "steps": STEPS,
                "log_every": 2,
                "checkpoints": {"every": EVERY},
                # Slow: at ten times this rate rounding grows a hundredfold, and with SGD a millionfold, by the end
                "optimiser": {"name": "adamw", "learning_rate": 0.0001},
            },
        }
    },
    "cluster": {"workers": 2},
}


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Training:
    """The run that nobody interrupts."""
    training = Training(cluster, "whole")
    training.ends(training.start())
    assert len(training.losses()) == STEPS // 2
    return training


def assert_same(training: Training, whole: Training) -> None:
    assert training.weights() == whole.weights(), "bit for bit"
    assert training.losses() == whole.losses(), "no step of a metric is lost, or there twice"
    assert training.run().info.status == "FINISHED"


def assert_near(training: Training, whole: Training) -> None:
    """Of a run that had other numbers of workers."""
    logged, expected = training.losses(), whole.losses()
    assert logged.keys() == expected.keys()
    off = {step: abs(value / expected[step][0] - 1) for step, (value,) in logged.items()}
    assert max(off.values()) < 1e-5, off


def test_terminated_driver_saves_and_says_resume_me_and_a_killed_one_goes_on(whole: Training) -> None:
    training = Training(whole.cluster, "driver")
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


def test_terminated_worker_has_all_save_and_a_killed_one_is_replaced(whole: Training) -> None:
    training = Training(whole.cluster, "worker")
    process = training.start()
    training.until(process, lambda: training.saved() >= EVERY)
    os.kill(whole.cluster.workers()[1], signal.SIGTERM)
    training.until(process, lambda: SAVED in training.log)
    stopped = training.saved()
    training.until(process, lambda: training.saved() > stopped)
    os.kill(whole.cluster.workers()[0], signal.SIGKILL)
    training.until(process, lambda: "workers failed (" in training.log)
    training.ends(process)
    assert_same(training, whole)


def test_run_leaves_a_node_that_will_go_takes_a_new_one_and_survives_its_loss(whole: Training) -> None:
    cluster, training = whole.cluster, Training(whole.cluster, "node", ("cluster.min_workers=1",))
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
    assert_near(training, whole)


def test_torchrun_comes_to_the_same_weights_as_ray(whole: Training) -> None:
    training = Training(whole.cluster, "torchrun")
    training.launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--local-ranks-filter=0"]
    training.ends(training.start())
    assert_same(training, whole)
