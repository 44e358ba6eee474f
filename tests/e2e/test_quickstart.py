"""The whole job in miniature, by the card's line on a real cluster; then again, in every way that a user may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.data.typeface_packages import fetch
from pipeline.errors import DataError
from tests.e2e.cluster import BIN, PrivateRay, private_ray
from tests.e2e.grid import CELLS, build_grid
from tests.e2e.servers import postgres
from tests.e2e.walkthrough import differing, run, steps_in

ROOT = Path(__file__).parents[2]
PAIRS = ["v1/v1", "v2/v1", "v2/v2", "v2-paragon/v1", "v2-paragon/v2", "v2-paragon/v2-paragon"]
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[PrivateRay]:
    try:
        fetch("yomogi", home / "data" / "cache")
    except DataError as error:
        pytest.skip(f"typefaces cannot be fetched here: {error}")
    with private_ray(home) as running:
        yield running


@pytest.fixture(scope="module")
def submitted(ray: PrivateRay) -> str:
    """What `ray job submit` printed, with the working directory travelling as the card's line says."""
    line = ["job", "submit", "--address", ray.dashboard, "--working-dir", ".", "--"]
    line += ["python", "jobs/train_bct.py", "--config", "configs/tiny.yaml"]
    command = [str(BIN / "ray"), *line]
    for _ in range(30):
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=ray.environment, capture_output=True, text=True, timeout=580
        )
        if "No available agent" not in done.stderr:  # the dashboard answers before the agent that runs jobs is up
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(submitted: str, home: Path) -> dict[str, Any]:
    assert "compatible" in submitted
    assert "with v1" in submitted
    content: dict[str, Any] = json.loads((home / "runs" / "tiny" / "report.json").read_text())
    return content


def alone(home: Path, *arguments: str, job: str = "train_bct") -> subprocess.CompletedProcess[str]:
    """`python jobs/train_bct.py`, with a Ray of its own if it needs one: none of these runs should."""
    command = [sys.executable, f"jobs/{job}.py", "--config", "configs/tiny.yaml", *arguments]
    environment = {**os.environ, "BCT_HOME": str(home), "RAY_ADDRESS": "127.0.0.1:1"}  # no Ray: it must not be asked
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert all(words in message for words in told), message


def test_report_holds_every_pair(report: dict[str, Any]) -> None:
    assert report["generations"] == ["v1", "v2", "v2-paragon"]
    assert list(report["matrix"]) == ["rank1", "tar@1e-2"]
    for row in report["matrix"].values():
        assert sorted(row) == sorted(PAIRS)
        assert all(0.0 <= one["low"] <= one["value"] <= one["high"] <= 1.0 for one in row.values())
    held = all(row["v2/v1"]["value"] > row["v1/v1"]["value"] for row in report["matrix"].values())
    assert report["criterion"].keys() == {"v2/v1", "v2-paragon/v1", "v2-paragon/v2"}
    assert report["criterion"]["v2/v1"]["held"] == held
    assert [pair for pair, judged in report["criterion"].items() if judged["ancestor"]] == ["v2/v1"]
    for section in ("update_gain", "negative_flips", "threshold"):
        assert report[section].keys() == report["criterion"].keys()
    assert report["update_gain"]["v2/v1"].keys() == report["matrix"].keys()
    backfill = report["backfill"]["v2/v1"]
    for order in ("random", "uncertainty"):
        ends = [report["matrix"]["rank1"][pair]["value"] for pair in ("v2/v1", "v2/v2")]
        assert [backfill[order]["rank1"][0], backfill[order]["rank1"][-1]] == pytest.approx(ends)
    assert report["seconds"].keys() == {"data", "v1", "v2", "v2-paragon", "evaluation"}
    assert report["mlflow"]["model"] == "tiny"
    versions = report["mlflow"]["versions"]
    assert sorted(versions) == ["v1", "v2", "v2-paragon"]
    assert sorted(versions.values()) == [1, 2, 3]
    assert versions["v1"] < versions["v2"], "a parent is registered before its child"


def test_pictures_are_there(report: dict[str, Any], home: Path) -> None:
    assert report
    for name in ("det.png", "matrix-rank1.png", "matrix-tar-at-1e-2.png", "backfill-rank1.png"):
        assert (home / "runs" / "tiny" / name).read_bytes().startswith(b"\x89PNG"), name
    assert "v2/v1" in (home / "runs" / "tiny" / "report.md").read_text()
    assert len(list((home / "runs" / "tiny" / "embeddings").glob("*.safetensors"))) == 3


def test_mlflow_holds_runs_curves_lineage_and_versions(report: dict[str, Any]) -> None:
    client = MlflowClient(report["mlflow"]["tracking_uri"])
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"v1", "v2", "v2-paragon"}
    v2 = client.get_run(runs["v2"].info.run_id)  # a search leaves the model inputs out
    assert v2.info.status == "FINISHED"
    assert v2.data.params["compat.method"] == "bct-sys"
    assert json.loads(v2.data.tags["parents"]).keys() == {"v1"}
    assert v2.inputs is not None
    assert [entry.dataset.name for entry in v2.inputs.dataset_inputs] == ["train"]
    assert len(v2.inputs.model_inputs) == 1
    for key in ("loss/v2", "loss/v1"):
        history = client.get_metric_history(v2.info.run_id, key)
        assert [point.step for point in history] == list(range(20, 601, 20))
    assert any(key.startswith("system/") for key in v2.data.metrics)
    versions = {one.tags["generation"]: one for one in client.search_model_versions("name='tiny'")}
    assert json.loads(versions["v2"].tags["parents"])["v1"]["digest"] == versions["v1"].tags["digest"]
    assert client.get_model_version_by_alias("tiny", "candidate").version in {one.version for one in versions.values()}
    logged = {entry.path for entry in client.list_artifacts(v2.info.run_id, "plots")}
    assert any(path.endswith("det.png") for path in logged)


def test_run_again_finds_everything_and_does_nothing(report: dict[str, Any], home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "runs" / "tiny" / "generations").rglob("*")}
    done = alone(home)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (home / "runs" / "tiny" / "generations").rglob("*")}
    again = json.loads((home / "runs" / "tiny" / "report.json").read_text())
    assert again["matrix"] == report["matrix"]
    assert again["mlflow"] == report["mlflow"]
    client = MlflowClient(report["mlflow"]["tracking_uri"])
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_evaluation_alone_gives_the_same_figures(report: dict[str, Any], home: Path) -> None:
    done = alone(home, job="evaluate")
    assert done.returncode == 0, done.stderr
    folder = home / "runs" / "tiny" / "evaluation"
    told = json.loads((folder / "report.json").read_text())
    assert told["matrix"] == report["matrix"]
    assert {path.name for path in folder.iterdir()} >= {"report.md", "det.png", "matrix-rank1.png"}
    assert "v2 is" in done.stdout
    some = alone(home, "--generations", "v1,v2", "evaluation.bootstrap=0", job="evaluate")
    assert some.returncode == 0, some.stderr
    told = json.loads((folder / "report.json").read_text())
    assert told["generations"] == ["v1", "v2"]
    assert told["matrix"]["rank1"]["v1/v1"]["low"] is None
    refused(alone(home, "--generations", "v1,v9", job="evaluate"), "'v9'", "choose of v1, v2, v2-paragon")


def test_reused_name_with_another_config_names_the_keys(report: dict[str, Any], home: Path) -> None:
    assert report
    done = alone(home, "generations.v2.margin.m3=0.3", "generations.v2.training.steps=9")
    refused(done, "generation 'v2'", "margin.m3 (was 0.2, now 0.3)", "training.steps (was 600, now 9)")


def test_changed_shard_is_refused_before_training(report: dict[str, Any], home: Path) -> None:
    assert report
    shard = next((home / "data" / "typefaces-tiny" / "train").glob("*.tar"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:2000] + bytes([kept[2000] ^ 1]) + kept[2001:])
    try:
        refused(alone(home), shard.name, "changed after packing")
    finally:
        shard.write_bytes(kept)


def test_missing_and_empty_data_are_refused(report: dict[str, Any], home: Path, tmp_path: Path) -> None:
    assert report
    refused(alone(home, "data.source=none", f"data.train={tmp_path / 'nowhere'}"), "does not exist", "pack.py")
    (tmp_path / "empty").mkdir()
    refused(alone(home, "data.source=none", f"data.train={tmp_path / 'empty'}"), "is empty", "pack.py")


def test_changed_parent_is_refused_before_workers_are_asked(report: dict[str, Any], home: Path) -> None:
    assert report
    weights = home / "runs" / "tiny" / "generations" / "v1" / "backbone.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        done = alone(home, "generations.v3.parents=[v1]", "generations.v3.backbone={embedding_dim: 64, width: 8}")
        refused(done, "generation 'v1'", "backbone.safetensors has changed")
    finally:
        weights.write_bytes(kept)


def test_parent_that_is_not_registered_is_refused(report: dict[str, Any], home: Path) -> None:
    assert report
    refused(alone(home, "generations.v2.parents=[v0]"), "'v0' is not registered")


def test_grid_is_trained_measured_and_written_and_then_found(ray: PrivateRay, home: Path) -> None:
    done = build_grid(home, {**ray.environment, "RAY_ADDRESS": ray.gcs})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((home / "results.json").read_text())
    searched = {"rank1", "tpir@1e-1"}
    for table, metrics in zip(told["tables"], (searched | {"tar@1e-2"}, searched), strict=True):
        assert [row["label"] for row in table["rows"]] == list(CELLS[2:])
        for row in table["rows"]:
            assert set(row["metrics"]) == metrics
            for one in row["metrics"].values():
                assert one["difference"]["value"] == pytest.approx(one["new/old"]["value"] - one["old/old"]["value"])
                assert one["difference"]["low"] <= one["difference"]["value"] <= one["difference"]["high"]
    text = (home / "RESULTS.md").read_text()
    assert all(f"| {name} | " in text for name in CELLS[2:])

    sealed = {path: path.stat().st_mtime_ns for path in (home / "runs" / "paper-table").rglob("generation.json")}
    assert len(sealed) == len(CELLS) + 1
    nobody = {**os.environ, "BCT_HOME": str(home), "RAY_ADDRESS": "127.0.0.1:1"}  # there is nothing to ask Ray for
    again = build_grid(home, nobody)
    assert again.returncode == 0, again.stderr
    assert sealed == {
        path: path.stat().st_mtime_ns for path in (home / "runs" / "paper-table").rglob("generation.json")
    }
    assert (home / "RESULTS.md").read_text() == text


def test_the_upgrade_of_the_docs_goes_as_it_says(report: dict[str, Any], home: Path) -> None:
    assert report["criterion"]["v2/v1"]["held"], "the miniature is meant to be compatible"
    instead = {"configs/quickstart.yaml": "configs/tiny.yaml", "typefaces-small": "typefaces-tiny"}
    steps = steps_in(ROOT / "docs" / "upgrade.md")
    assert len(steps) > 20
    with postgres() as database:
        names = {"BCT_HOME": str(home), "DATABASE_URL": database.uri, "RAY_ADDRESS": "127.0.0.1:1"}
        for step in steps:
            printed = run(step, home, {**os.environ, **names}, instead)
            assert differing(step, printed) is None, f"{step.command}\n" + "\n".join(printed)


def test_step_is_measured_beside_a_bare_one(
    report: dict[str, Any], ray: PrivateRay, home: Path, tmp_path: Path
) -> None:
    assert report
    command = [sys.executable, "jobs/benchmark.py", "step", "--config", "configs/tiny.yaml", "--json"]
    command += [str(tmp_path / "step.json"), "--steps", "40", "--rounds", "1"]
    before = set((home / "runs").iterdir())
    environment = {**ray.environment, "RAY_ADDRESS": ray.gcs}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "step.json").read_text())
    (one,) = told["rounds"]
    assert told["overhead"] == pytest.approx(one["product"] / one["bare"] - 1)
    assert told["overhead_of_loader"] == pytest.approx(one["fed"] / one["bare"] - 1)
    assert set((home / "runs").iterdir()) == before, "nothing of it is left"
