"""Whoever reaches a Ray cluster can run code on it: in every documented way it asks for a token, on loopback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.tracking.store import ui_command

ROOT = Path(__file__).parents[2]
TOKEN = "RAY_AUTH_MODE"
TEXTS = sorted(
    path
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
        "docs/*.md",
        "jobs/*.py",
        "kube/**/*.yaml",
        "kube/**/*.md",
    )
    for path in ROOT.glob(pattern)
)


def section(text: str, place: int) -> str:
    """What a reader has in view of a page at a place: from its heading to the next."""
    start = text.rfind("\n## ", 0, place)
    end = text.find("\n## ", place)
    return text[max(start, 0) : end if end >= 0 else len(text)]


def unguarded(path: Path) -> list[str]:
    """Commands to start Ray, or to hand it a job, without the token mode being set where they stand."""
    text = path.read_text()
    found = []
    for match in re.finditer(r"\bray (?:start|job submit)\b[^\n]*", text):
        seen = text if path.name == "Makefile" else section(text, match.start())
        if not re.search(rf"{TOKEN}\s*:?=\s*\"?token", seen):
            found.append(match[0])
    return found


def test_every_documented_way_to_ray_asks_for_a_token() -> None:
    assert {ROOT / "README.md", ROOT / "Makefile", ROOT / "kube" / "jobs" / "rayjob" / "rayjob.yaml"} <= set(TEXTS)
    assert any(re.search(r"\bray start\b", path.read_text()) for path in TEXTS)
    assert any(re.search(r"\bray job submit\b", path.read_text()) for path in TEXTS)
    assert {path.name: found for path in TEXTS if (found := unguarded(path))} == {}


@pytest.mark.parametrize("line", ["ray start --head", "    ray job submit --working-dir . -- python jobs/train_bct.py"])
def test_a_page_without_it_is_found(tmp_path: Path, line: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n## One\n\n{line}\n\n## Two\n\n    export RAY_AUTH_MODE=token\n")
    assert unguarded(page) == [line.strip()]


def test_every_cluster_of_the_manifests_asks_for_a_token() -> None:
    for path in (ROOT / "kube").rglob("*.yaml"):
        text = path.read_text()
        if "headGroupSpec:" in text:  # what overlays make of it: tests/kube/test_schemas.py
            assert re.search(r"authOptions:\n\s+mode: token\n", text), path


def test_dashboards_are_bound_to_loopback() -> None:
    for path in TEXTS:
        if path.is_relative_to(ROOT / "kube"):  # in a pod, which nothing outside the cluster reaches
            continue
        text = path.read_text().replace("\\\n", " ")
        assert "0.0.0.0" not in text, path
        for match in re.finditer(r"\bray start\b[^\n]*--head[^\n]*", text):
            assert "--dashboard-host=127.0.0.1" in match[0], path
    for uri in ("sqlite:////home/mlflow.db", "postgresql://me:secret@host/db"):
        assert "--host" not in ui_command(uri, "1"), "MLflow's own default is loopback"
