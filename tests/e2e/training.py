"""One small training by the same command each time, on a private Ray whose processes and nodes are lost meanwhile."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline.data.finishing import write_data_set
from pipeline.data.sources import Sample
from pipeline.identities import IdentityTable
from tests.e2e.cluster import PrivateRay, processes

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
STEPS, EVERY = 300, 20
CONFIG: dict[str, Any] = {
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


def write_images(home: Path) -> None:
    """The training set."""
    rng, table = np.random.default_rng(1), IdentityTable(tuple(f"id-{number}" for number in range(10)))
    images = (Sample(f"s{n:03d}", drawn(rng, n % 10), "png", f"id-{n % 10}", {}) for n in range(160))
    write_data_set(home / "data" / "train", "made by hand", table, [list(images)])


def drawn(rng: np.random.Generator, identity: int) -> bytes:
    """An image of noise around the identity's own grey."""
    pixels = rng.integers(0, 100, (32, 32), dtype=np.uint8) + np.uint8(15 * identity)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@dataclass
class Training:
    """A run of one generation, by the same command each time."""

    ray: PrivateRay
    home: Path
    name: str
    settings: tuple[str, ...] = ()
    launcher: list[str] = field(default_factory=lambda: [sys.executable])
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.home / f"{self.name}.log").read_text()

    @property
    def checkpoints(self) -> Path:
        return self.home / "runs" / self.name / "training" / "v1" / "checkpoints"

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        config = self.home / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        command = [*self.launcher, "jobs/train_bct.py", "--config", str(config)]
        command += [f"name={self.name}", *self.settings, *overrides]
        environment = {**self.ray.environment, "RAY_ADDRESS": self.ray.gcs, **self.variables}
        with (self.home / f"{self.name}.log").open("a") as log:
            command = self.ray.host.command(command)
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
        return MlflowClient(f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}")

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
        folder = self.home / "runs" / self.name / "generations" / "v1"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def workers_of(session: int) -> list[int]:
    """Process ids of a node's training workers."""
    return [pid for pid in processes(session) if title(pid).startswith("ray::RayTrainWorker")]


def title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def assert_same(training: Training, whole: Training) -> None:
    assert training.weights() == whole.weights(), "bit for bit"
    assert training.losses() == whole.losses(), "no step of a metric is lost, or there twice"
    assert training.run().info.status == "FINISHED"


def assert_close(training: Training, whole: Training) -> None:
    """Losses that were computed by other numbers of workers differ by rounding."""
    logged, expected = training.losses(), whole.losses()
    assert logged.keys() == expected.keys(), "no step of a metric is lost"
    off = {step: abs(value / expected[step][0] - 1) for step, (value,) in logged.items()}
    assert max(off.values()) < 1e-5, off
