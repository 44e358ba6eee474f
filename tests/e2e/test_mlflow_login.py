"""MLflow with users that must log in, as the manifest of the cluster starts it."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from pipeline.errors import RegistryError
from pipeline.registry import Registry
from tests.e2e.servers import Server, mlflow_server

MANIFEST = Path(__file__).parents[2] / "kube" / "base" / "mlflow.yaml"
PASSWORD = "planted-9f2c81d0"
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def server_of_the_manifest(folder: Path) -> Server:
    """The server with the manifest's way of logging in, on a store of its own."""
    documents = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(MANIFEST.read_text())}
    (container,) = documents["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    (app,) = (argument for argument in container["args"] if argument.startswith("--app-name="))
    ini = documents["ConfigMap", "mlflow-auth"]["data"]["basic_auth.ini"]
    (folder / "basic_auth.ini").write_text(ini.replace("/mlflow/", f"{folder}/"))
    given = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
    assert given.keys() | {"MLFLOW_FLASK_SERVER_SECRET_KEY"} <= {entry["name"] for entry in container["env"]}
    environment = {**given, "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 64}
    return mlflow_server(folder, f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts"), environment, [app])


def test_nobody_reads_or_writes_without_logging_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    with server_of_the_manifest(tmp_path) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
        with pytest.raises(RegistryError, match=r"(?i)401|not authenticated") as refused:
            Registry(server.url, "glyphs")
        assert "\n" not in str(refused.value)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert Registry(server.url, "glyphs").versions() == {}
