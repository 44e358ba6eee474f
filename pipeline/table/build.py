"""The whole table: train what is missing, measure what is missing, write the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.assessment import Split
from pipeline.code import code_version
from pipeline.family import Member, train_missing
from pipeline.files import write_atomically, write_json
from pipeline.generation import Generation
from pipeline.registry import Registry
from pipeline.registry_opening import open_registry
from pipeline.run import Clock, prepare_data, train_with_bars
from pipeline.table.grid import Grid, Table
from pipeline.table.measuring import Figures, measure_pairs, pairs_of
from pipeline.table.results import table_json, table_markdown


def build(grid: Grid, markdown: Path, figures: Path, title: str, partial: bool = False) -> dict[str, Any]:
    """Do all of the grid that is not done, and write its tables.

    Args:
        grid: cells and tables.
        markdown: the tables, to be read.
        figures: the same as JSON, every metric with its interval.
        title: what stands at the top of `markdown`.
        partial: train nothing; rows of cells that are not trained say so.

    Returns:
        What `figures` holds.

    Raises:
        PipelineError: as a training run, or an evaluation.
    """
    config = grid.run
    registry = open_registry(config)
    generations = _sealed(grid, registry) if partial else _trained(grid, registry)
    measured = _measure(grid, generations)
    told = {
        "code": code_version(),
        "generations": {name: one.digest for name, one in generations.items()},
        "tables": [table_json(grid, table, measured[_images(table)]) for table in grid.tables],
    }
    write_json(figures, told)
    parts = [title, *(table_markdown(grid, table, measured[_images(table)]) for table in grid.tables)]
    write_atomically(markdown, "\n".join(parts).encode())
    _log(registry, measured.get(("test", 0), {}))
    return told


def _trained(grid: Grid, registry: Registry) -> dict[str, Generation]:
    """All cells, once they are trained."""
    checks = prepare_data(grid.run)
    clock = Clock(grid.run.folder / "seconds.json")
    generations = train_missing(grid.run, registry, lambda plans: train_with_bars(plans, clock))
    for check in checks:
        check.wait()
    return generations


def _sealed(grid: Grid, registry: Registry) -> dict[str, Generation]:
    """The cells that are trained and registered."""
    members = [Member(grid.run, name, registry) for name in grid.run.generations]
    found = {member.name: member.registered() for member in members}
    return {name: generation for name, generation in found.items() if generation is not None}


def _images(table: Table) -> tuple[Split, int]:
    """What a table is measured on: the split, and the groups of a template."""
    return "validation" if table.split == "validation" else "test", table.templates


def _measure(grid: Grid, generations: dict[str, Generation]) -> dict[tuple[Split, int], dict[tuple[str, str], Figures]]:
    needed: dict[tuple[Split, int], list[tuple[str, str]]] = {}
    for table in grid.tables:
        pairs = [pair for row in table.rows for pair in pairs_of(grid, row)]
        needed.setdefault(_images(table), []).extend(pair for pair in pairs if generations.keys() >= set(pair))
    return {
        (split, templates): measure_pairs(grid, generations, pairs, split, templates) if pairs else {}
        for (split, templates), pairs in needed.items()
    }


def _log(registry: Registry, measured: dict[tuple[str, str], Figures]) -> None:
    """Give each cell's run the figures of the pairs whose queries it embeds."""
    by_query: dict[str, dict[str, float]] = {}
    for (query, gallery), figures in measured.items():
        for metric, estimate in figures.items():
            by_query.setdefault(query, {})[f"{metric}/{query} on {gallery}"] = estimate.value
    for name, values in by_query.items():
        registry.log_evaluation(name, values)
