"""The grid of the paper's tables in miniature: trained, measured and written by the job; then found as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.typeface_packages import fetch
from pipeline.errors import DataError
from tests.e2e.cluster import PrivateRay, private_ray

ROOT = Path(__file__).parents[2]
CELLS = ("v1", "paragon", "bct-kd", "bct-sys", "mixbct", "bt2", "fct")
pytestmark = pytest.mark.timeout(600)


def miniature(home: Path) -> dict[str, Any]:
    """The repository's own grid with few cells, tiny networks and a few steps."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "paper_table.yaml").read_text())
    tiny = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    tree["run"] |= {"home": str(home), "data": tiny["data"], "evaluation": {"group": "typeface", "far": [0.01]}}
    tree["run"]["evaluation"] |= {"fpir": [0.1], "bootstrap": 50}
    tree["cells"] = {name: tree["cells"][name] for name in CELLS}
    tree["cells"]["v1"] |= {"seeds": 2, "identities": 20}
    tree["cells"] |= {name: {**tree["cells"][name], "seeds": 1} for name in CELLS[1:]}
    tree["defaults"]["training"] |= {"steps": 3, "global_batch": 32}
    tree["cells"]["v1"]["training"] = {"steps": 3}
    tree["defaults"]["backbone"] |= {"width": 8, "embedding_dim": 16}
    tree["cells"]["bt2"]["backbone"] = {"embedding_dim": 20}
    rows = [{"label": name, "new": name} for name in CELLS[2:]]
    tree["tables"] = [{"title": "In miniature", "rows": rows}]
    return tree


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


def build(home: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    grid = home / "grid.yaml"
    grid.write_text(yaml.safe_dump(miniature(home), sort_keys=False))
    command = [sys.executable, "jobs/paper_table.py", "--config", str(grid)]
    command += ["--markdown", str(home / "RESULTS.md"), "--json", str(home / "results.json")]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_grid_is_trained_measured_and_written_and_then_found(ray: PrivateRay, home: Path) -> None:
    done = build(home, {**ray.environment, "RAY_ADDRESS": ray.gcs})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((home / "results.json").read_text())
    (table,) = told["tables"]
    assert [row["label"] for row in table["rows"]] == list(CELLS[2:])
    for row in table["rows"]:
        for metric in ("rank1", "tpir@1e-1", "tar@1e-2"):
            one = row["metrics"][metric]
            assert one["difference"]["value"] == pytest.approx(one["new/old"]["value"] - one["old/old"]["value"])
            assert one["difference"]["low"] <= one["difference"]["value"] <= one["difference"]["high"]
    text = (home / "RESULTS.md").read_text()
    assert all(f"| {name} | " in text for name in CELLS[2:])

    sealed = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("generation.json")}
    assert len(sealed) == len(CELLS) + 1
    again = build(home, {**os.environ, "BCT_HOME": str(home), "RAY_ADDRESS": "127.0.0.1:1"})  # nothing to ask Ray for
    assert again.returncode == 0, again.stderr
    assert sealed == {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("generation.json")}
    assert (home / "RESULTS.md").read_text() == text
