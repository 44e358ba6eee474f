"""MLflow as the manifests of the cluster start it: users that must log in, PostgreSQL, artefacts in a bucket."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.errors import RegistryError
from pipeline.registry import Registry
from tests.e2e.cluster import free_ports
from tests.e2e.servers import Postgres, Server, postgres, s3_server
from tests.kube.manifests import Tree, named, overlays, rendered
from tests.kube.policies import environment
from tests.unit.test_registry import make_generation, start

PASSWORD = "planted-9f2c81d0"
DESTINATION = "s3://artifacts/mlflow"
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@dataclass(frozen=True)
class Stack:
    """MLflow, and what stands behind it."""

    mlflow: Server
    database: Postgres
    s3: Server
    ini: str

    def client(self) -> Any:
        """Of the bucket: what S3 says, not MLflow."""
        access = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.s3.url, **access)


def told(container: Tree, database: Postgres, s3: Server, folder: Path) -> dict[str, str]:
    """The container's environment, its secrets filled in, its addresses those of the servers of the test."""
    secrets = {
        ("mlflow-auth", "password"): PASSWORD,
        ("mlflow-auth", "flask-key"): "k" * 64,
        ("mlflow-database", "password"): "trusted: any will do",
        ("artifact-store", "destination"): DESTINATION,
        ("artifact-store", "endpoint"): s3.url,
        ("artifact-store", "region"): "us-east-1",
        ("artifact-store", "access-key"): "key",
        ("artifact-store", "secret-key"): "secret",
    }
    found = {}
    for name, entry in environment(container).items():
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        found[name] = entry["value"] if reference is None else secrets[reference["name"], reference["key"]]
    moved = {"HOME": str(folder), "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini")}
    return {name: moved.get(name, at(value, database)) for name, value in found.items()}


def at(text: str, database: Postgres) -> str:
    """With the database of the test in the place of the cluster's."""
    return text.replace("postgresql://postgres:5432/mlflow", database.uri.replace("mlflow@", ""))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The dev overlay's server, begun by its own init container."""
    folder = tmp_path_factory.mktemp("mlflow")
    documents = named(rendered(overlays()["dev"]))
    pod = documents["Deployment", "mlflow"]["spec"]["template"]["spec"]
    [server], [bucket] = pod["containers"], pod["initContainers"]
    ini = documents["ConfigMap", "mlflow-auth"]["data"]["basic_auth.ini"]
    with postgres() as database, s3_server(folder) as s3:
        (folder / "basic_auth.ini").write_text(at(ini, database))
        base = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        begin = [sys.executable, *bucket["command"][1:], *bucket["args"]]
        for _ in range(2):  # a second start of the pod finds it
            subprocess.run(begin, check=True, env={**base, **told(bucket, database, s3, folder)})
        [port] = free_ports(1)
        assert server["command"] == ["mlflow", "server"]
        options = [one for one in server["args"] if not one.startswith(("--host=", "--port="))]
        assert len(options) == len(server["args"]) - 2
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", *options]
        hosts = [number for number, one in enumerate(command) if one.startswith("--allowed-hosts=")]
        command[hosts[0]] += ",127.0.0.1:*"  # the cluster's names are not known here
        url = f"http://127.0.0.1:{port}"
        with Server(command, url, folder / "mlflow.log", told(server, database, s3, folder)) as mlflow:
            yield Stack(mlflow, database, s3, ini)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not logged in, and speaks to no proxy."""
    proxies = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    for name in (*proxies, "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def test_nobody_reads_or_writes_without_logging_in(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    url = stack.mlflow.url
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    with pytest.raises(RegistryError, match=r"(?i)401|not authenticated") as refused:
        Registry(url, "glyphs")
    assert "\n" not in str(refused.value)
    log_in(monkeypatch)
    assert Registry(url, "glyphs").versions() == {}


def test_runs_and_users_lie_in_the_database_and_artefacts_in_the_bucket(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)  # clients have no keys: the server passes artefacts on
    registry = Registry(stack.mlflow.url, "stored")
    generation = make_generation(tmp_path, "v1", family="stored")
    found = registry.register(start(registry, "v1"), generation, {"rank1": 0.5})
    assert registry.get("v1").digest == found.digest
    assert stack.database.ask("select username from users") == [("admin",)]
    assert ("stored",) in stack.database.ask("select name from registered_models")
    place = urllib.parse.urlsplit(DESTINATION)
    listed = stack.client().list_objects_v2(Bucket=place.netloc, Prefix=place.path.strip("/"))
    assert any(one["Key"].endswith("/backbone.safetensors") for one in listed["Contents"])


def test_no_password_stands_in_what_the_manifest_says(stack: Stack) -> None:
    assert "@" not in stack.ini
    assert "password" not in stack.ini.lower().replace("basic_auth", "")
