"""The tables as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation.bootstrap import Estimate
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.table.grid import Grid, Table
from pipeline.table.measuring import Figures, Judged, judge, measured_trios, searched

HEADER = (
    "| new model | metric | old/old | new/old | difference | criterion | new/new | less paragon | update gain | paper |"
)
RULE = "|---|---|---:|---:|---:|:---:|---:|---:|---:|---|"


def table_markdown(grid: Grid, table: Table, measured: Mapping[tuple[str, str], Figures]) -> str:
    """One table: a line for each row and metric that the criterion is judged on."""
    lines = [f"## {table.title}", ""]
    if table.text:
        lines += [table.text.strip(), ""]
    lines += [HEADER, RULE]
    for row in table.rows:
        if not (seeds := len(measured_trios(grid, row, measured))):
            lines.append(f"| {row.label} | not trained yet | | | | | | | | {row.paper} |")
            continue
        for number, metric in enumerate(_config(grid, table).judged):
            one = judge(grid, row, measured, metric)
            label = "" if number else row.label + (f" ({seeds} seeds)" if seeds > 1 else "")
            lines.append("| " + " | ".join((label, metric, *_cells(one), "" if number else row.paper)) + " |")
    return "\n".join(lines) + "\n"


def _cells(one: Judged) -> Iterator[str]:
    yield _percent(one.old)
    yield _percent(one.cross)
    yield _points(one.difference)
    low = (one.difference.interval() or (one.difference.value,))[0]
    yield "**met**" if low > 0 else ("met, not certain" if one.difference.value > 0 else "fails")
    yield _percent(one.new)
    yield _points(one.cost) if one.cost else ""
    yield _gain(one.gain)


def _percent(one: Estimate) -> str:
    return f"{100 * one.value:.1f}"


def _points(one: Estimate) -> str:
    interval = one.interval()
    told = f"{100 * one.value:+.1f}"
    return told if interval is None else f"{told} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _gain(one: Estimate | None) -> str:
    if one is None:
        return "none"
    interval = one.interval()
    told = f"{100 * one.value:.0f} %"
    return told if interval is None else f"{told} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def table_json(grid: Grid, table: Table, measured: Mapping[tuple[str, str], Figures]) -> dict[str, Any]:
    """One table with every metric and interval."""
    rows = []
    for row in table.rows:
        if not (seeds := len(measured_trios(grid, row, measured))):
            continue
        metrics = {}
        for metric in _config(grid, table).metric_names:
            one = judge(grid, row, measured, metric)
            named = {
                "old/old": one.old,
                "new/old": one.cross,
                "new/new": one.new,
                "paragon/paragon": one.paragon,
                "difference": one.difference,
                "cost": one.cost,
                "update_gain": one.gain,
            }
            metrics[metric] = {name: None if part is None else part.to_json() for name, part in named.items()}
        rows.append({"label": row.label, "new": row.new, "old": row.old, "seeds": seeds, "metrics": metrics})
    return {"title": table.title, "split": table.split, "templates": table.templates, "rows": rows}


def _config(grid: Grid, table: Table) -> EvaluationConfig:
    return searched(grid.run.evaluation) if table.templates else grid.run.evaluation
