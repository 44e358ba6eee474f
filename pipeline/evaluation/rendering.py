"""A report for people: a line for each upgrade on the terminal, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

Value = dict[str, float | None]

MOST_TABLES = 4  # more upgrades have their lines only


def percent(value: Value | None, signed: bool = False) -> str:
    """`31.2 [30.1, 32.4]`, in percent; without the interval where there is none."""
    if value is None or value["value"] is None:
        return "none"
    sign = "+" if signed else ""
    told = f"{100 * value['value']:{sign}.1f}"
    ends = [value["low"], value["high"]]
    if ends == [None, None]:
        return told
    return f"{told} [{', '.join('no end' if end is None else f'{100 * end:{sign}.1f}' for end in ends)}]"


def verdict(judged: dict[str, Any]) -> str:
    """A few words on a criterion."""
    if not judged["held"]:
        return "NOT compatible"
    return "compatible" if judged["certain"] else "compatible (not beyond chance)"


def verdicts(report: dict[str, Any]) -> list[str]:
    """A line for each upgrade of the lineage: `v2 is compatible with v1: rank1 +1.9 [+0.8, +3.1], ...`."""
    lines = []
    for pair, judged in _upgrades(report):
        new, old = pair.split("/")
        differences = ", ".join(f"{name} {percent(judged['differences'][name], True)}" for name in report["matrix"])
        lines.append(f"{new} is {verdict(judged)} with {old}: {differences}")
    return lines


def render(report: dict[str, Any]) -> Group:
    """Lay a report out for the terminal, in 80 columns: the self-tests, and a table for each of few upgrades."""
    upgrades = _upgrades(report)
    tables = [_upgrade_table(report, pair, judged) for pair, judged in upgrades] if len(upgrades) <= MOST_TABLES else []
    shown = tables if tables and len(report["generations"]) <= MOST_TABLES else [_self_tests(report), *tables]
    return Group(*shown)


def _self_tests(report: dict[str, Any]) -> Table:
    table = Table(title="self-tests, % [95 % interval]", title_style="")
    table.add_column("generation", no_wrap=True)
    names = list(report["matrix"])[:MOST_TABLES]  # as many as fit
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for generation in report["generations"]:
        pair = f"{generation}/{generation}"
        table.add_row(generation, *(percent(report["matrix"][name][pair]) for name in names))
    return table


def _upgrade_table(report: dict[str, Any], pair: str, judged: dict[str, Any]) -> Table:
    """A row a metric: the old model alone, the upgrade, what is reached after a backfill, and what that is worth."""
    new, old = pair.split("/")
    paragon = report["paragons"].get(new)
    table = Table(title=f"{new} is {verdict(judged)} with {old} (%, 95 % intervals)", title_style="", box=box.SIMPLE)
    pairs = [f"{old}/{old}", pair, f"{new}/{new}"]
    for head in ("", *pairs, "difference", *(["update gain"] if paragon else [])):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, row in report["matrix"].items():
        values = [percent({**row[each], "low": None, "high": None}) for each in pairs]
        gains = [percent(report["update_gain"][pair][name])] if paragon else []
        table.add_row(name, *values, percent(judged["differences"][name], True), *gains)
    return table


def markdown(report: dict[str, Any], name: str) -> str:
    """The whole report as Markdown; values in percent with their 95 % intervals."""
    parts = [f"# Evaluation of {name}", ""]
    parts += ["Percent; in brackets the 95 % interval over identities.", "", *_matrix(report)]
    parts += [*_criterion(report), *_flips(report), *_thresholds(report), *_backfill(report)]
    return "\n".join(parts) + "\n"


def _upgrades(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(pair, judged) for pair, judged in report["criterion"].items() if judged["ancestor"]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, the first column to the left, and an empty line; nothing without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}", *lines, ""] if lines else []


def _matrix(report: dict[str, Any]) -> list[str]:
    names = list(report["matrix"])
    pairs = list(report["matrix"][names[0]]) if names else []
    table = _table(
        ["query/gallery", *names],
        ([pair, *(percent(report["matrix"][name][pair]) for name in names)] for pair in pairs),
    )
    average = report["average_compatibility"]
    if any(value["value"] is not None for value in average.values()):
        told = ", ".join(f"{name} {percent(value)}" for name, value in average.items())
        table += [f"Average compatibility: {told}.", ""]
    return table


def _criterion(report: dict[str, Any]) -> list[str]:
    names = list(report["matrix"])
    rows = []
    for pair, judged in report["criterion"].items():
        lineage = "yes" if judged["ancestor"] else "no"
        rows.append([pair, lineage, verdict(judged), *(percent(judged["differences"][n], True) for n in names)])
    gains = ([pair, *(percent(told[n]) for n in names)] for pair, told in report["update_gain"].items())
    told = _table(["new/old", "lineage", "verdict", *(f"{name}: new/old less old/old" for name in names)], rows)
    told += _table(
        ["new/old", *(f"update gain, {name}" for name in names)], (row for row in gains if set(row[1:]) - {"none"})
    )
    if not told:
        return []
    judged_on = ", ".join(report["criterion_on"])
    return ["## Criterion", "", f"Judged strictly, on all of {judged_on} (Shen et al. 2020, Eq. 3 and 9).", "", *told]


def _flips(report: dict[str, Any]) -> list[str]:
    rows = (
        [pair, percent(told["negative"]), percent(told["positive"])] for pair, told in report["negative_flips"].items()
    )
    table = _table(["new/old", "right before, wrong now", "wrong before, right now"], rows)
    return ["## Flips at rank 1", "", *table] if table else []


def _thresholds(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            pair,
            name,
            _cosine(told["old_threshold"]),
            _rate(told["far_at_old_threshold"]),
            _cosine(told["restoring_threshold"]),
        ]
        for pair, each in report["threshold"].items()
        for name, told in each.items()
    ]
    table = _table(["new/old", "rate", "old threshold", "FAR at the old threshold", "threshold that restores it"], rows)
    return ["## Thresholds", "", "Cosines; false accept rates as shares.", "", *table] if table else []


def _cosine(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _rate(value: Value) -> str:
    low, high = (f"{value[end]:.2e}" if value[end] is not None else "none" for end in ("low", "high"))
    told = f"{value['value']:.2e}"
    return told if low == high == "none" else f"{told} [{low}, {high}]"


def _backfill(report: dict[str, Any]) -> list[str]:
    rows = [
        [pair, name, f"{100 * curves['random'][name][0]:.1f}", f"{100 * curves['random'][name][-1]:.1f}"]
        + [f"{100 * curves[order]['area'][name]:.1f}" for order in ("random", "uncertainty")]
        for pair, curves in report["backfill"].items()
        for name in (curves["random"]["area"] if curves else ())
    ]
    table = _table(["new/old", "metric", "before", "after", "area, random order", "area, uncertain first"], rows)
    return (
        ["## Partial backfill", "", "The area is the mean figure while the backfill runs.", "", *table] if table else []
    )
