"""The tracker and its journal against a real MLflow store: sqlite in a temporary folder, no server, no doubles."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.registry import MlflowTracker, Registry
from tests.unit.test_registry import CLOSED, start

# MLflow's own queries, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "figures.jsonl"


def test_tracker_records_metrics_and_system_metrics(registry: Registry, client: MlflowClient, journal: Path) -> None:
    run_id = start(registry, "v1")
    with registry.tracker(run_id, journal) as tracker:
        for step in range(0, 2500, 2):  # more values than one request takes
            tracker.log(step, {"loss": 1.0 / (step + 1), "TAR@FAR": float("nan")})
    assert tracker.unsent == 0
    history = client.get_metric_history(run_id, "loss")
    assert {metric.step: metric.value for metric in history} == {step: 1.0 / (step + 1) for step in range(0, 2500, 2)}
    metrics = client.get_run(run_id).data.metrics
    assert metrics["TAR_FAR"] != metrics["TAR_FAR"], "a loss that is not a number is recorded as such"
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100


def test_system_metrics_are_sampled_while_it_runs_and_can_be_off(
    registry: Registry, client: MlflowClient, journal: Path
) -> None:
    run_id = start(registry, "v1")
    tracker = MlflowTracker(registry.uri, run_id, journal, system_every=0.01)
    key = "system/disk_usage_percentage"
    while len(client.get_metric_history(run_id, key)) < 2:  # bounded by pytest's timeout
        pass
    tracker.close()
    other = start(registry, "v2")
    with MlflowTracker(registry.uri, other, journal.with_name("other"), system_every=0) as quiet:
        quiet.log(0, {"loss": 1.0})
    assert client.get_run(other).data.metrics == {"loss": 1.0}


def test_a_resumed_run_records_no_step_of_a_metric_twice(
    registry: Registry, client: MlflowClient, journal: Path
) -> None:
    run_id = start(registry, "v1")
    for steps in (range(1, 6), range(4, 8)):  # killed after step 5, resumed from the checkpoint of step 3
        with MlflowTracker(registry.uri, run_id, journal, system_every=0) as tracker:
            for step in steps:
                tracker.log(step, {"loss": 1.0 / step} | ({"late": 0.0} if step > 6 else {}))
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == list(range(1, 8))
    assert [metric.step for metric in client.get_metric_history(run_id, "late")] == [7]
    assert tracker.unsent == 0


def test_a_run_that_goes_back_after_a_spike_records_no_step_twice(
    registry: Registry, client: MlflowClient, journal: Path
) -> None:
    run_id = start(registry, "v1")
    with MlflowTracker(registry.uri, run_id, journal, system_every=0) as tracker:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5), (4, 0.5)):
            tracker.log(step, {"loss": loss})
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")]
    assert history == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]


LOGS_AND_DIES = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking.tracker import MlflowTracker
tracker = MlflowTracker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), system_every=0)
for step in range(int(sys.argv[4]), int(sys.argv[5])):
    tracker.log(step, {"loss": 1.0 / (step + 1)})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("sender", ["the next tracker", "the registry"])
def test_what_a_killed_process_could_not_send_is_sent(
    registry: Registry, client: MlflowClient, journal: Path, sender: str
) -> None:
    """Its last figures may belong to steps that are in a checkpoint, and so are not reported again."""
    run_id = start(registry, "v1")
    for steps in ((0, 4), (4, 7)):
        command = [sys.executable, "-c", LOGS_AND_DIES, registry.uri, run_id, str(journal), *map(str, steps)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with journal.open("ab") as stream:
        stream.write(b'{"step": 7, "time": 1, "metrics": {"lo')  # it was killed while it wrote
    if sender == "the registry":
        registry.log_journal(run_id, journal)
        registry.log_journal(run_id, journal)
    else:
        with MlflowTracker(registry.uri, run_id, journal, system_every=0) as tracker:
            tracker.log(7, {"loss": 1.0 / 8})
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")]
    assert history == [(step, 1.0 / (step + 1)) for step in range(7 if sender == "the registry" else 8)]


def test_figures_that_the_disk_does_not_take_do_not_end_the_training(
    registry: Registry, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with MlflowTracker(registry.uri, start(registry, "v1"), tmp_path / "gone" / "figures", system_every=0) as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.log(1, {"loss": 1.0})
    (told,) = capfd.readouterr().err.splitlines()
    assert "gone/figures does not take the figures" in told
    assert "they are lost" in told


def test_a_tracker_is_built_in_another_process_from_two_strings_and_a_path(
    registry: Registry, client: MlflowClient, journal: Path
) -> None:
    run_id = start(registry, "v1")
    script = (
        "import sys, pathlib\n"
        "from pipeline.tracking.tracker import MlflowTracker\n"
        "assert 'mlflow' not in sys.modules, 'the training thread waits for the import of MLflow'\n"
        "tracker = MlflowTracker(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), system_every=0)\n"
        "for step in range(5000): tracker.log(step, {'worker': float(step)})\n"
        "tracker.close()\n"
        "assert tracker.unsent == 0\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", script, registry.uri, run_id, str(journal)]
    worker = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)
    written = 0
    while worker.poll() is None:  # the driver writes all the time that the worker does
        registry.log_evaluation(run_id, {"driver": float(written)})
        written += 1
        time.sleep(0.02)  # leave the worker a core to start on
    assert worker.stderr is not None
    assert worker.stderr.read() == b""
    worker.stderr.close()
    assert worker.returncode == 0
    assert len(client.get_metric_history(run_id, "worker")) == 5000
    assert len(client.get_metric_history(run_id, "driver")) == written > 0


def test_a_tracker_of_a_server_that_is_down_keeps_all_values_and_says_so_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(CLOSED, "a" * 32, journal, system_every=0)
    for step in range(200):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    tracker.close()
    assert tracker.unsent == 200
    complaint, summary = capfd.readouterr().err.splitlines()
    assert CLOSED in complaint
    assert "training goes on" in complaint
    kept = f"{journal} keeps them, until the run goes on or is registered"
    assert summary == f"MLflow: 200 values of run {'a' * 32} were not sent; {kept}"


def test_close_does_not_wait_for_a_server_that_accepts_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = MlflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "a" * 32, journal, system_every=0)
        tracker.log(0, {"loss": 1.0, "lr": 0.1})
        connection, _ = silent.accept()  # the request is on its way: the thread waits for an answer
        tracker.close(timeout=0.1)
        assert tracker.unsent == 2
        connection.close()
    for thread in threading.enumerate():  # what it has to say of this belongs to no other test
        if thread.name == f"mlflow-{'a' * 32}":
            thread.join()


def test_values_wait_until_the_store_works(
    migrated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], journal: Path
) -> None:
    store = tmp_path / "store" / "mlflow.db"
    before = tmp_path / "before.db"
    shutil.copy(migrated, before)
    run_id = start(Registry(f"sqlite:///{before}", "glyphs", tmp_path / "artifacts"), "v1")
    store.parent.mkdir()
    store.write_bytes(b"this is no database" * 100)
    tracker = MlflowTracker(f"sqlite:///{store}", run_id, journal, system_every=0)
    tracker.log(0, {"loss": 1.0})
    while "training goes on" not in (told := capfd.readouterr().err):  # bounded by pytest's timeout
        pass
    store.write_bytes(before.read_bytes())
    tracker.close()
    assert tracker.unsent == 0
    assert "not a database" in told
    assert MlflowClient(f"sqlite:///{store}").get_run(run_id).data.metrics == {"loss": 1.0}


def test_values_of_a_request_that_failed_are_sent_again(
    registry: Registry, client: MlflowClient, tmp_path: Path, capfd: pytest.CaptureFixture[str], journal: Path
) -> None:
    run_id = start(registry, "v1")
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("ALTER TABLE metrics RENAME TO hidden")
    tracker = MlflowTracker(registry.uri, run_id, journal, system_every=0)
    tracker.log(0, {"loss": 2.0})
    while "training goes on" not in capfd.readouterr().err:  # bounded by pytest's timeout
        time.sleep(0.01)
    tracker.log(1, {"loss": 1.0})
    database.execute("ALTER TABLE hidden RENAME TO metrics")
    database.close()
    tracker.close()
    assert tracker.unsent == 0
    assert {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")} == {0: 2.0, 1: 1.0}


def test_values_that_the_store_refuses_are_told_and_the_rest_goes_on(
    registry: Registry, capfd: pytest.CaptureFixture[str], journal: Path
) -> None:
    tracker = MlflowTracker(registry.uri, "0" * 32, journal, system_every=0)
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert tracker.unsent == 0
    (complaint,) = capfd.readouterr().err.splitlines()
    assert "not found" in complaint
    assert "are lost" in complaint
