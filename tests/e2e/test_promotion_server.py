"""Promotion through a real tracking server, where the lock is a row of its database."""

from pathlib import Path

import pytest

from pipeline.promotion.lock import RowLock, lock_of
from pipeline.registry import Registry
from tests.e2e.servers import mlflow_server
from tests.unit.families import Family
from tests.unit.test_promotion import config_file, promote_two_at_once

# MLflow's own queries, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_two_processes_promote_through_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts")) as server:
        family = Family.make(Registry(server.url, "glyphs"), tmp_path / "artefacts")
        assert isinstance(lock_of(family.registry), RowLock)
        promote_two_at_once(family, config_file(tmp_path, server.url), tmp_path)
        assert [model.name for model in family.registry.client.search_registered_models()] == ["glyphs"]
