"""The training job on torchrun's processes, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tests.e2e.cluster import BIN
from tests.e2e.training import write_images

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
CONFIG = {
    "name": "launched",
    "data": {"source": "none", "train": "data/train", "test": None},
    "preprocess": {"size": 32, "resize": 32, "channels": 1},
    "defaults": {
        "margin": {"name": "cosface", "scale": 20.0, "m3": 0.2},
        "backbone": {"name": "small", "embedding_dim": 16, "width": 8, "depth": 0},
        "training": {"global_batch": 32, "log_every": 1, "checkpoints": {"every": 20}},
    },
    "generations": {
        "v1": {"training": {"steps": 5}},
        "v2": {"parents": ["v1"], "compat": {"method": "bct"}, "training": {"steps": 200}},
    },
    "cluster": {"workers": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_images(home)
    (home / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return home


@contextmanager
def launched(home: Path, log: Path, processes: int, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={processes}", "jobs/train_bct.py"]
    command += ["--config", str(home / "config.yaml"), *overrides]
    environment = {**os.environ, "BCT_HOME": str(home), "RAY_ADDRESS": "127.0.0.1:9"}  # nobody is there
    with log.open("w") as stream:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        try:
            yield run
        finally:
            run.kill()
            run.wait()


def weights(home: Path, name: str) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in (home / "runs" / name / "generations" / "v2").glob("*.safetensors")
    }


@pytest.mark.timeout(3 * PATIENCE_S)
def test_trains_on_its_processes_saves_at_sigterm_and_goes_on(home: Path, tmp_path: Path) -> None:
    with launched(home, tmp_path / "whole", 2) as whole:
        assert whole.wait(PATIENCE_S) == 0, (tmp_path / "whole").read_text()
    assert "v2" in (tmp_path / "whole").read_text()

    with launched(home, tmp_path / "cut", 2, "name=cut") as cut:
        saved = home / "runs" / "cut" / "training" / "v2" / "checkpoints"
        end = time.monotonic() + PATIENCE_S
        while not list(saved.glob("step-*/checkpoint.json")):
            assert cut.poll() is None, (tmp_path / "cut").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        first, second = psutil.Process(cut.pid).children()
        second.send_signal(signal.SIGTERM)  # one of them alone: both save, after the same step
        assert cut.wait(PATIENCE_S) != 0
        assert not first.is_running()
    told = (tmp_path / "cut").read_text()
    assert "stopped: v2: told to end (SIGTERM); its last step is in a checkpoint" in told

    with launched(home, tmp_path / "again", 2, "name=cut") as again:
        assert again.wait(PATIENCE_S) == 0, (tmp_path / "again").read_text()
    assert weights(home, "cut") == weights(home, "launched")
    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    curves = [curve(client, name) for name in ("launched", "cut")]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 201))


def test_another_number_of_processes_is_refused(home: Path, tmp_path: Path) -> None:
    with launched(home, tmp_path / "log", 1, "name=other") as process:
        assert process.wait(PATIENCE_S) != 0
    told = (tmp_path / "log").read_text()
    assert "error: torchrun has started 1 processes, but the config is for cluster.workers=2: start as many, or" in told
    assert not (home / "runs" / "other").exists()


def curve(client: MlflowClient, name: str) -> list[tuple[int, float]]:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.generation = 'v2'")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/v2")]
