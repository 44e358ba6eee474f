"""A real MLflow store for whoever asks: sqlite in a temporary folder, no server."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.registry import Registry


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One empty database at the current schema: making it runs every migration of MLflow's history."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    Registry(f"sqlite:///{path}", "unused")
    return path


@pytest.fixture
def uri(migrated: Path, tmp_path: Path) -> str:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def registry(uri: str, tmp_path: Path) -> Registry:
    return Registry(uri, "glyphs", tmp_path / "artifacts")


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)
