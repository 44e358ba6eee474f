"""The grid of the paper's tables: its cells, its rows, and what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.evaluation.bootstrap import Estimate
from pipeline.table.grid import Grid, load_grid
from pipeline.table.measuring import Figures, judge, pairs_of, trios
from pipeline.table.results import table_json, table_markdown

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs" / "paper_table.yaml"


def small_tree() -> dict[str, Any]:
    row = {"label": "ours", "new": "v2", "old": "v1", "paragon": "free"}
    return {
        "run": {
            "name": "small",
            "home": "/none",
            "evaluation": {"far": [0.01], "ranks": [1], "criterion_on": ["rank1"]},
        },
        "defaults": {"training": {"steps": 3}, "compat": {"method": "independent"}},
        "cells": {
            "v1": {"seeds": 2, "identities": 5},
            "free": None,
            "v2": {"seeds": 3, "parents": ["v1"], "compat": {"method": "bct"}},
        },
        "tables": [{"title": "All", "rows": [row]}],
    }


def written(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def small_grid(folder: Path) -> Grid:
    return load_grid(written(folder, small_tree()), [])


def test_the_papers_grid_is_whole() -> None:
    grid = load_grid(PAPER, ["run.home=/none"])
    assert {"v1", "paragon", "bct", "bct-kd", "bct-sys"} <= {name for name, seeds in grid.seeds.items() if seeds >= 3}
    used = {cell for table in grid.tables for row in table.rows for cell in (row.new, row.old, row.paragon)}
    assert grid.seeds.keys() <= used, "a cell that no table shows is trained for nothing"


def test_cells_become_generations_by_seed(tmp_path: Path) -> None:
    generations = small_grid(tmp_path).run.generations
    assert list(generations) == ["v1-s0", "v1-s1", "free", "v2-s0", "v2-s1", "v2-s2"]
    assert [one.seed for one in generations.values()] == [0, 1, 0, 0, 1, 2]
    assert [generations[f"v2-s{seed}"].parents for seed in range(3)] == [("v1-s0",), ("v1-s1",), ("v1-s1",)]
    assert generations["free"].training.steps == 3


def test_a_row_needs_each_seeds_pairs(tmp_path: Path) -> None:
    grid = small_grid(tmp_path)
    row = grid.tables[0].rows[0]
    assert trios(grid, row) == [("v2-s0", "v1-s0", "free"), ("v2-s1", "v1-s1", "free"), ("v2-s2", "v1-s1", "free")]
    assert set(pairs_of(grid, row)) >= {("v2-s2", "v1-s1"), ("v1-s1", "v1-s1"), ("free", "free"), ("v2-s0", "v2-s0")}


def figures(value: float, replicates: list[float]) -> Figures:
    return {name: Estimate(value, np.array(replicates)) for name in ("rank1", "tar@1e-2")}


@pytest.fixture
def measured() -> dict[tuple[str, str], Figures]:
    known = {("free", "free"): figures(0.8, [0.8, 0.8])}
    for seed, (old, cross) in enumerate([(0.4, 0.5), (0.6, 0.7), (0.6, 0.6)]):
        known[f"v1-s{min(seed, 1)}", f"v1-s{min(seed, 1)}"] = figures(old, [old - 0.1, old + 0.1])
        known[f"v2-s{seed}", f"v1-s{min(seed, 1)}"] = figures(cross, [cross - 0.1, cross + 0.1])
        known[f"v2-s{seed}", f"v2-s{seed}"] = figures(0.7, [0.7, 0.7])
    return known


def test_a_row_is_the_mean_over_seeds_by_hand(tmp_path: Path, measured: dict[tuple[str, str], Figures]) -> None:
    grid = small_grid(tmp_path)
    one = judge(grid, grid.tables[0].rows[0], measured, "rank1")
    old, cross = (0.4 + 0.6 + 0.6) / 3, (0.5 + 0.7 + 0.6) / 3
    assert one.old.value == pytest.approx(old)
    assert one.difference.value == pytest.approx(cross - old)
    assert one.difference.replicates_R == pytest.approx([cross - old] * 2)
    assert one.cost is not None
    assert one.cost.value == pytest.approx(-0.1)
    assert one.gain is not None
    assert one.gain.value == pytest.approx((cross - old) / (0.8 - old))
    assert one.gain.replicates_R == pytest.approx(
        [(cross - old) / (0.8 - old + 0.1), (cross - old) / (0.8 - old - 0.1)]
    )


def test_what_is_written_tells_the_verdict(tmp_path: Path, measured: dict[tuple[str, str], Figures]) -> None:
    grid = small_grid(tmp_path)
    text = table_markdown(grid, grid.tables[0], measured)
    assert "| ours (3 seeds) | rank1 | 53.3 | 60.0 | +6.7 [+6.7, +6.7] | **met** |" in text
    told = table_json(grid, grid.tables[0], measured)
    assert told["rows"][0]["metrics"]["tar@1e-2"]["difference"]["low"] == pytest.approx(0.0667, abs=1e-4)
    worse = {pair: figures(0.1, [0.1, 0.1]) if pair[0] != pair[1] else one for pair, one in measured.items()}
    assert "| fails |" in table_markdown(grid, grid.tables[0], worse)


def test_a_table_of_templates_tells_of_searches_alone(tmp_path: Path, measured: dict[tuple[str, str], Figures]) -> None:
    grid = small_grid(tmp_path)
    table = grid.tables[0].model_copy(update={"templates": 2})
    assert "tar@1e-2" in table_json(grid, grid.tables[0], measured)["rows"][0]["metrics"]
    text, told = table_markdown(grid, table, measured), table_json(grid, table, measured)
    assert "| ours (3 seeds) | rank1 |" in text
    assert "tar@" not in text
    assert told["templates"] == 2
    assert not any(name.startswith("tar@") for name in told["rows"][0]["metrics"])


def test_what_is_not_trained_yet_is_left_out_and_said(tmp_path: Path, measured: dict[tuple[str, str], Figures]) -> None:
    grid = small_grid(tmp_path)
    part = {pair: one for pair, one in measured.items() if "v2-s2" not in pair}
    assert "| ours (2 seeds) | rank1 | 50.0 | 60.0 |" in table_markdown(grid, grid.tables[0], part)
    assert table_json(grid, grid.tables[0], part)["rows"][0]["seeds"] == 2
    assert "| ours | not trained yet |" in table_markdown(grid, grid.tables[0], {})
    assert table_json(grid, grid.tables[0], {})["rows"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tables": [{"title": "T", "rows": [{"label": "x", "new": "v9"}]}]}, "row 'x': there is no cell 'v9'"),
        ({"tables": []}, "tables"),
        ({"cells": None}, "it needs `run`, a run's config, and `cells`"),
        ({"cells": {"v1": {"identitys": 3}}}, "identitys"),
        ({"tables": [{"title": "T", "split": "train", "rows": [{"label": "x", "new": "v1"}]}]}, "split"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_grid(written(tmp_path, small_tree() | change), [])
    assert told in str(error.value)
    assert "\n" not in str(error.value)
