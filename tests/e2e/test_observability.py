"""A real Prometheus scrapes a real Ray on which a training runs: each query of the dashboard finds what it asks for."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.parts import PARTS
from pipeline.tracking.store import TrackingConfig, connect, tracking_location
from tests.e2e.cluster import PrivateRay, private_ray
from tests.e2e.observed import OBSERVABILITY, Prometheus, prometheus, training
from tests.e2e.servers import eventually

NO_GPU = ("ray_node_gpus_", "ray_node_gram_")  # what Ray only measures where there is one
SETTINGS: dict[str, Any] = {
    "checkpoints": {"every": 50},
    "observe": {"peak_tflops": 0.1},  # a CPU's is not known
    "profile": {"start": 20, "steps": 2},
}
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[PrivateRay]:
    with private_ray(home, settings={"RAY_metrics_report_interval_ms": "2000", "BCT_LOG_FORMAT": "json"}) as running:
        yield running


@pytest.fixture(scope="module")
def watched(ray: PrivateRay, home: Path) -> Iterator[Prometheus]:
    """Asked once the training has said something, and until the end of the tests."""
    with prometheus(ray, home) as server, training(ray, home, **SETTINGS) as driver:
        eventually(
            lambda: driver.poll() is not None or len(server.ask("ray_bct_steps_total > 100")) == 2,
            lambda: (home / "err").read_text()[-2000:],
            seconds=300,
        )
        assert driver.poll() is None, (home / "err").read_text()[-2000:] + (ray.folder / "log").read_text()[-2000:]
        yield server


def queries() -> list[str]:
    """Of all panels, with the variables at their defaults."""
    board = json.loads((OBSERVABILITY / "grafana-dashboard.json").read_text())
    exprs = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    variables = {"$family": ".*", "$generation": ".*", "$rank": ".*", "$__rate_interval": "1m"}
    for name, value in variables.items():
        exprs = [expr.replace(name, value) for expr in exprs]
    return exprs


def test_every_query_of_the_dashboard_finds_series(watched: Prometheus) -> None:
    asked = queries()
    assert len(asked) > 25
    assert not any("$" in query for query in asked)
    for query in asked:
        if any(name in query for name in NO_GPU):
            watched.ask(query)  # understood, at least
        else:
            eventually(lambda: watched.ask(query), lambda: f"nothing answers {query}", seconds=60)  # noqa: B023


def test_parts_of_each_rank_add_up_to_its_step(watched: Prometheus) -> None:
    both = "sum by (rank) (ray_bct_step_part_seconds) / on (rank) max by (rank) (ray_bct_step_seconds)"
    eventually(lambda: len(watched.ask(both)) == 2)
    for series in watched.ask(both):
        assert float(series["value"][1]) == pytest.approx(1, rel=0.01)
    names = {series["metric"]["part"] for series in watched.ask("ray_bct_step_part_seconds")}
    assert names == set(PARTS)


def test_no_alert_is_raised_of_a_training_that_gets_on(watched: Prometheus) -> None:
    eventually(lambda: watched.ask("bct:training == 1"))
    rules = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())["groups"][0]["rules"]
    slow = {"BctLoaderBound", "BctStraggler"}  # of a busy machine and the smallest of networks nothing is known
    for rule in rules:
        if rule.get("alert") not in slow | {None}:
            assert watched.ask(rule["expr"]) == [], rule["alert"]


def test_workers_log_lines_say_where_they_come_from(watched: Prometheus, ray: PrivateRay, home: Path) -> None:
    assert watched.ask("ray_bct_step")
    logs = list((ray.folder / "t" / "session_latest" / "logs").glob("worker-*.err"))
    lines = [line for path in logs for line in path.read_text().splitlines() if line.startswith("{")]
    told = [entry for entry in map(json.loads, lines) if entry["logger"] == "pipeline.training.loop"]
    assert {(one["run"], one["generation"], one["rank"]) for one in told} == {
        ("watched", "v1", 0),
        ("watched", "v1", 1),
    }
    assert len({one["step"] for one in told}) > 5
    driver = [json.loads(line) for line in (home / "out").read_text().splitlines()]
    assert {one["run"] for one in driver} == {"watched"}


def test_the_trace_of_the_config_lies_beside_the_checkpoints(watched: Prometheus, home: Path) -> None:
    assert watched.ask("ray_bct_step")
    (path,) = (home / "runs" / "watched" / "training" / "v1" / "traces").iterdir()
    assert path.name == "trace-00000-000020.json.gz"
    with gzip.open(path) as stream:
        names = {event["name"] for event in json.load(stream)["traceEvents"]}
    assert {"load", "gather", "classifier", "exchange", "reduce", "optimiser"} <= names


def test_mlflow_has_the_same_figures(watched: Prometheus, home: Path) -> None:
    assert watched.ask("ray_bct_step")
    client = connect(tracking_location(TrackingConfig(), home)[0])
    experiment = client.get_experiment_by_name("watched")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    eventually(lambda: "time/step" in client.get_run(run.info.run_id).data.metrics)
    metrics = client.get_run(run.info.run_id).data.metrics
    assert metrics.keys() >= {"mfu", "flops_per_s", "checkpoint/age_s", *(f"time/{part}" for part in PARTS)}


def test_while_a_training_hangs_its_ages_grow(watched: Prometheus, ray: PrivateRay) -> None:
    """Rank 1 stands still, and rank 0 waits for it in a collective."""
    logs = (ray.folder / "t" / "session_latest" / "logs").glob("worker-*.err")
    (process,) = (int(path.stem.rpartition("-")[2]) for path in logs if '"rank": 1,' in path.read_text())
    os.kill(process, signal.SIGSTOP)
    try:
        for name in ("report", "checkpoint"):
            query = f'time() - ray_bct_{name}_timestamp_seconds{{rank="0"}} > 15'
            eventually(lambda: watched.ask(query), lambda: f"not {query}")  # noqa: B023
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=OBSERVABILITY, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
