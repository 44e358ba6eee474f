"""A plan for people, and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.console import console, say
from pipeline.planning.config import GIB
from pipeline.planning.scale import ScalePlan, bound_by, efficiency
from pipeline.planning.search import CapacityPlan, Estimate


def show(plan: CapacityPlan) -> None:
    """Print the chosen setting, the alternatives, and what is cheapest."""
    console.print(chosen_table(plan))
    console.print(alternatives_table(plan))
    console.print(plan.rates.source, markup=False)
    say(conclusion(plan))


def chosen_table(plan: CapacityPlan) -> Table:
    """Memory, time and communication of the chosen setting by item; items that are zero are left out."""
    chosen = plan.chosen
    table = Table(
        title=f"A GPU's share of a step: {words_of(chosen)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "item"):
        table.add_column(column)
    table.add_column("amount", justify="right")
    _add_items(table, "memory, GiB", chosen.memory, 1 / GIB)
    _add_items(table, "time, ms", chosen.seconds, 1e3)
    _add_items(table, "received, MB", chosen.traffic, 1e-6)
    return table


def alternatives_table(plan: CapacityPlan) -> Table:
    """One line for each number of ranks and sample rate, with its best class group."""
    table = Table(
        title="Alternatives, each with its best class group",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("GPUs", "rate", "group", "GiB/GPU", "ms/step", "samples/s", "GPU-s/1M"):
        table.add_column(column, justify="right")
    table.add_column("fits")
    for one in plan.alternatives:
        table.add_row(
            str(one.setting.ranks),
            f"{one.setting.sample_rate:g}",
            str(one.setting.class_group),
            f"{one.memory_bytes / GIB:,.1f}",
            f"{1e3 * one.step_seconds:,.1f}",
            f"{one.batch / one.step_seconds:,.0f}",
            f"{1e6 * one.gpu_seconds_per_sample:,.1f}",
            _verdict(one, plan),
            end_section=one.setting.ranks != _ranks_after(one, plan),
        )
    return table


def show_scale(plan: ScalePlan) -> None:
    """Print the training on more and more GPUs."""
    console.print(scale_table(plan))
    say("efficiency: speed over that of the same GPUs doing the same without waiting for each other")
    console.print(plan.rates.source, markup=False)


def scale_table(plan: ScalePlan) -> Table:
    """One line for each number of GPUs."""
    first = plan.points[0]
    table = Table(
        title=f"{first.batch // first.setting.ranks} samples a GPU, {plan.config.identities:,} identities, "
        f"sample rate {first.setting.sample_rate:g}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("GPUs", "group", "batch", "GiB/GPU", "ms/step", "images/s", "efficiency"):
        table.add_column(column, justify="right")
    table.add_column("bound by", no_wrap=True)
    for one in plan.points:
        speed = one.batch / one.step_seconds
        table.add_row(
            f"{one.setting.ranks:,}",
            f"{one.setting.class_group:,}",
            f"{one.batch:,}",
            f"{one.memory_bytes / GIB:,.1f}",
            f"{1e3 * one.step_seconds:,.1f}",
            f"{speed:,.0f}",
            f"{efficiency(one):.1%}",
            bound_by(one) if one.fits else f"does not fit, by {(one.memory_bytes - one.available) / GIB:,.1f} GiB",
        )
    return table


def conclusion(plan: CapacityPlan) -> str:
    """Tell the cheapest setting in one line, and the cheapest without sampling where it is another."""
    line = f"cheapest that fits: {words_of(plan.chosen)}, {_cost(plan.chosen)}"
    if plan.unsampled is not None and plan.unsampled is not plan.chosen:
        line += f"; without sampling: {words_of(plan.unsampled)}, {_cost(plan.unsampled)}"
    elif plan.unsampled is None and plan.config.sample_rate is None:
        line += "; without sampling nothing fits"
    return line


def as_json(plan: CapacityPlan) -> dict[str, Any]:
    """All of the plan: bytes, seconds, and what they were computed from."""
    return _origin_json(plan) | {
        "chosen": _estimate_json(plan.chosen),
        "without_sampling": None if plan.unsampled is None else _estimate_json(plan.unsampled),
        "alternatives": [_estimate_json(one) for one in plan.alternatives],
    }


def scale_json(plan: ScalePlan) -> dict[str, Any]:
    """All of the plan on more and more GPUs."""
    points = [
        _estimate_json(one)
        | {
            "batch": one.batch,
            "images_per_s": one.batch / one.step_seconds,
            "efficiency": efficiency(one),
            "bound_by": bound_by(one),
        }
        for one in plan.points
    ]
    return _origin_json(plan) | {"scale": points}


def _origin_json(plan: CapacityPlan | ScalePlan) -> dict[str, Any]:
    return {
        "config": plan.config.model_dump(mode="json"),
        "calibrated": plan.rates.calibrated,
        "rates": asdict(plan.rates),
        "links": asdict(plan.config.links),
        "backbone": asdict(plan.backbone),
    }


def words_of(one: Estimate) -> str:
    """A setting in a few words."""
    gpus = f"{one.setting.ranks} GPU{'s' if one.setting.ranks > 1 else ''}"
    return f"{gpus}, class group {one.setting.class_group}, sample rate {one.setting.sample_rate:g}"


def _cost(one: Estimate) -> str:
    return f"{one.memory_bytes / GIB:.1f} GiB a GPU, {1e6 * one.gpu_seconds_per_sample:,.1f} GPU-s a million samples"


def _verdict(one: Estimate, plan: CapacityPlan) -> str:
    if not one.fits:
        return f"no, by {(one.memory_bytes - one.available) / GIB:,.1f} GiB"
    return "cheapest" if one is plan.chosen else "yes"


def _ranks_after(one: Estimate, plan: CapacityPlan) -> int | None:
    place = plan.alternatives.index(one) + 1
    return plan.alternatives[place].setting.ranks if place < len(plan.alternatives) else None


def _add_items(table: Table, what: str, items: Mapping[str, float], unit: float) -> None:
    first = what
    for name, amount in items.items():
        if amount:
            table.add_row(first, name, f"{amount * unit:,.2f}")
            first = ""
    table.add_row(first, "all", f"{sum(items.values()) * unit:,.2f}", end_section=True)


def _estimate_json(one: Estimate) -> dict[str, Any]:
    return {
        **asdict(one.setting),
        "fits": one.fits,
        "memory_bytes": one.memory_bytes,
        "step_seconds": one.step_seconds,
        "gpu_seconds_per_sample": one.gpu_seconds_per_sample,
        "memory": one.memory,
        "seconds": one.seconds,
        "traffic": one.traffic,
    }
