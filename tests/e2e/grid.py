"""The repository's own grid of the paper's tables in miniature, and the job that builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CELLS = ("v1", "paragon", "bct-kd", "bct-sys", "mixbct", "bt2", "fct")


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
    tree["tables"] = [{"title": "In miniature", "rows": rows}, {"title": "Templates", "templates": 1, "rows": rows}]
    return tree


def build_grid(home: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    grid = home / "grid.yaml"
    grid.write_text(yaml.safe_dump(miniature(home), sort_keys=False))
    command = [sys.executable, "jobs/paper_table.py", "--config", str(grid)]
    command += ["--markdown", str(home / "RESULTS.md"), "--json", str(home / "results.json")]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
