"""The registry on what teams run, MLflow on PostgreSQL and S3, and what is left when one of them goes down."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from mlflow import MlflowClient

from pipeline.errors import RegistryError
from pipeline.files import file_sha256
from pipeline.generation import RECORD
from pipeline.registry import RegisteredGeneration, Registry
from pipeline.tracking.store import TrackingConfig, tracking_location
from tests.e2e.cluster import free_ports
from tests.e2e.servers import S3_ACCESS, Postgres, Server, eventually, mlflow_server, postgres, s3_server
from tests.faulty import FaultyProxy
from tests.unit.test_registry import make_generation, start

# MLflow's own queries, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

ROOT = Path(__file__).parents[2]
BUCKET = "models"


@dataclass(frozen=True)
class Stack:
    """The servers, all of them up."""

    database: Postgres
    s3: Server
    mlflow: Server

    def objects(self, part: str) -> dict[str, str]:
        """Sha256 of the objects whose keys hold `part`, by key, as S3 tells it and not MLflow."""
        client = s3_client(self.s3)
        found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        keys = [one["Key"] for one in found if part in one["Key"]]
        return {
            key: hashlib.sha256(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()).hexdigest() for key in keys
        }

    def mend(self) -> None:
        """Bring up again what a test has ended."""
        if not self.database.running():
            self.database.start()
        self.mlflow.kill()
        self.mlflow.start()


def s3_client(server: Server) -> Any:
    access = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=server.url, **access)


def assert_stored(stack: Stack, found: RegisteredGeneration) -> None:
    """Every file of the artefact is in the bucket once, byte for byte."""
    objects = stack.objects(f"/{found.model_id}/")
    for name, digest in (*found.open().record.files.items(), (RECORD, file_sha256(found.path / RECORD))):
        assert [sha for key, sha in objects.items() if key.endswith(f"/{name}")] == [digest], name


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("servers")
    with postgres() as database, s3_server(folder) as s3:
        s3_client(s3).create_bucket(Bucket=BUCKET)
        access = {**S3_ACCESS, "MLFLOW_S3_ENDPOINT_URL": s3.url}
        with mlflow_server(folder, database.uri, f"s3://{BUCKET}", access) as mlflow:
            yield Stack(database, s3, mlflow)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def opened(monkeypatch: pytest.MonkeyPatch, url: str, family: str, home: Path) -> Registry:
    """As the jobs open it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    uri, artifact_root = tracking_location(TrackingConfig(), home)
    assert (uri, artifact_root) == (url, None), "the server has a place for artefacts"
    return Registry(uri, family, artifact_root)


def register(
    registry: Registry, folder: Path, name: str, parents: tuple[RegisteredGeneration, ...] = ()
) -> RegisteredGeneration:
    digests = {parent.name: parent.digest for parent in parents}
    generation = make_generation(folder, name, digests, registry.family, seed=len(parents))
    run_id = start(registry, name, parents)
    with registry.tracker(run_id, folder / f"{run_id}.jsonl") as tracker:
        for step in range(1500):  # more values than one request takes
            tracker.log(step, {"loss": 1.0 / (step + 1)})
    assert tracker.unsent == 0
    found = registry.register(run_id, generation, {"rank1": 0.5}, candidate=True)
    registry.finish_run(run_id)
    return found


def test_generations_and_their_lineage_lie_in_postgresql_and_their_files_in_s3(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened(monkeypatch, stack.mlflow.url, "lineage", tmp_path)
    first = register(registry, tmp_path, "v1")
    second = register(registry, tmp_path, "v2", (first,))

    again = Registry(stack.mlflow.url, "lineage")
    assert again.versions() == {"v1": first, "v2": second}
    assert again.get("v2").open().record.parents == {"v1": first.digest}
    client = MlflowClient(stack.mlflow.url)
    lineage = {"v1": {"digest": first.digest, "model_id": first.model_id, "version": "1"}}
    assert json.loads(client.get_model_version("lineage", "2").tags["parents"]) == lineage
    inputs = client.get_run(second.run_id).inputs
    assert inputs is not None
    assert [one.model_id for one in inputs.model_inputs] == [first.model_id]
    assert client.get_model_version_by_alias("lineage", "candidate").version == "2"
    assert {one.step for one in client.get_metric_history(second.run_id, "loss")} == set(range(1500))

    rows = stack.database.ask("select version, run_id from model_versions where name = 'lineage' order by version")
    assert rows == [(1, first.run_id), (2, second.run_id)]
    for found in (first, second):
        assert_stored(stack, found)


def test_generation_is_taken_from_the_store_where_its_folder_is_not(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine knows the server alone."""
    found = register(opened(monkeypatch, stack.mlflow.url, "download", tmp_path), tmp_path, "v1")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "import mlflow\n"
        "from pipeline.generation import Generation\n"
        "folder = mlflow.artifacts.download_artifacts(f'models:/{sys.argv[1]}', dst_path=sys.argv[2])\n"
        "generation = Generation(Path(folder))\n"
        "generation.verify()\n"
        "assert generation.reproduce_selftest() > 0.9999\n"
        "print(generation.digest)\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": stack.mlflow.url, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", script, found.model_id, tmp_path / "copy"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.split()[-1] == found.digest


def test_a_database_and_its_server_tell_the_same(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server between: PostgreSQL as the tracking URI itself, artefacts in a folder."""
    found = register(opened(monkeypatch, stack.mlflow.url, "direct", tmp_path), tmp_path, "v1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.database.uri)
    uri, artifact_root = tracking_location(TrackingConfig(), tmp_path)
    assert artifact_root == tmp_path / "mlflow" / "artifacts"
    assert Registry(uri, "direct", artifact_root).versions() == {"v1": found}
    alone = Registry(uri, "alone", artifact_root)
    second = register(alone, tmp_path / "alone", "v1")
    assert Registry(stack.mlflow.url, "alone").versions() == {"v1": second}
    assert list(artifact_root.glob(f"alone/**/{second.model_id}/artifacts/{RECORD}"))


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["mlflow", "database"])
def test_metrics_catch_up_when_a_server_that_went_down_is_back(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ended: str
) -> None:
    end, start_again = {
        "mlflow": (stack.mlflow.kill, stack.mlflow.start),
        "database": (stack.database.stop, stack.database.start),
    }[ended]
    registry = opened(monkeypatch, stack.mlflow.url, f"without-{ended}", tmp_path)
    run_id, client = start(registry, "v1"), MlflowClient(stack.mlflow.url)
    with registry.tracker(run_id, tmp_path / "figures.jsonl") as tracker:
        tracker.log(0, {"loss": 1.0})
        eventually(lambda: client.get_metric_history(run_id, "loss"))
        end()
        for step in range(1, 3000):
            tracker.log(step, {"loss": 1.0 / (step + 1)})
        told = ""
        while "training goes on" not in told:  # bounded by pytest's timeout
            told += capfd.readouterr().err
            time.sleep(0.05)
        tracker.log(3000, {"loss": 0.0})
        start_again()
        eventually(lambda: len(client.get_metric_history(run_id, "loss")) == 3001)
    assert tracker.unsent == 0
    history = {one.step: one.value for one in client.get_metric_history(run_id, "loss")}
    assert history == {step: 1.0 / (step + 1) for step in range(3000)} | {3000: 0.0}
    registry.finish_run(run_id)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_server_without_its_database_is_one_line(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.database.stop()
    try:
        with pytest.raises(RegistryError, match=f"MLflow's store {stack.mlflow.url}: opening it failed") as error:
            opened(monkeypatch, stack.mlflow.url, "nobody", tmp_path)
    finally:
        stack.database.start()
    assert "\n" not in str(error.value)
    assert str(error.value).count("Traceback") == 0


def test_job_ends_before_it_does_anything_where_the_server_is_down(tmp_path: Path) -> None:
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": url, "BCT_HOME": str(tmp_path / "home")}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "jobs/train_bct.py"]
    job = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 2
    assert job.stdout == ""
    [line] = job.stderr.splitlines()
    assert line.startswith(f"error: MLflow's store {url} does not answer (")
    assert "start it, or set tracking.uri or MLFLOW_TRACKING_URI" in line
    assert not (tmp_path / "home").exists(), "no data was made, no worker asked"


Moment = Literal["before", "after"]


@dataclass
class Tripwire:
    """Ends the server when a request for a path comes: before it is passed on, or when it is answered."""

    server: Server
    path: str
    moment: Moment
    tripped: bool = False
    armed: bool = True

    def disarm(self) -> None:
        """Let everything through from now on."""
        self.tripped = self.armed = False


class TrippingProxy(FaultyProxy):
    """Passes requests on until the tripwire is touched; then nothing, as the server is gone."""

    def __init__(self, port: int, wire: Tripwire) -> None:
        super().__init__(port)
        self._wire = wire

    def answer(self, client: BaseHTTPRequestHandler) -> None:
        ours = client.command != "GET" and client.path.partition("?")[0].endswith(self._wire.path)
        touched = self._wire.armed and ours
        if touched and self._wire.moment == "before":
            self._trip()
        if touched and self._wire.moment == "after":
            unheard, client.wfile = client.wfile, io.BytesIO()
            super().answer(client)
            client.wfile = unheard
            self._trip()
        elif not self._wire.tripped:
            super().answer(client)
        client.close_connection = client.close_connection or self._wire.tripped

    def _trip(self) -> None:
        self._wire.tripped = True
        self._wire.server.kill()


@pytest.mark.parametrize(
    ("path", "moment"),
    [("/backbone.safetensors", "before"), ("/model-versions/create", "before"), ("/model-versions/create", "after")],
)
def test_registration_that_a_dying_server_cut_off_is_completed_by_the_next(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, moment: Moment
) -> None:
    family = f"cut-{moment}{path.count('-')}"
    wire = Tripwire(stack.mlflow, path, moment)
    # one address before and after: MLflow keeps to the one at which it first found a run's artefacts
    with TrippingProxy(int(stack.mlflow.url.rpartition(":")[2]), wire) as proxy:
        registry = opened(monkeypatch, proxy.url, family, tmp_path)
        generation = make_generation(tmp_path, "v1", family=family)
        run_id = start(registry, "v1")
        try:
            with pytest.raises(RegistryError) as error:
                registry.register(run_id, generation, {"rank1": 0.5})
        finally:
            stack.mend()
        assert wire.tripped, str(error.value)
        assert "\n" not in str(error.value)
        wire.disarm()
        left = registry.versions()
        assert list(left) == (["v1"] if moment == "after" else []), "a version is there whole or not at all"
        found = registry.register(run_id, generation, {"rank1": 0.5})
        assert registry.versions() == {"v1": found}
        assert not left or left["v1"] == found
    client = MlflowClient(stack.mlflow.url)
    [model] = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert (model.model_id, str(model.status)) == (found.model_id, "READY")
    assert [one.value for one in client.get_metric_history(run_id, "rank1")] == [0.5]
    assert_stored(stack, found)
