"""Pictures of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

KEYS = {
    "classifier": ("classes", "step_ms", "extra_bytes", "dim", "batch", "machine"),
    "backfill": ("rank1", "shares", "generations", "keys"),
    "scaling": ("step_ms", "alone_ms", "efficiency", "parts_ms", "batch", "rows", "backbone", "machine"),
    "loader": ("augment", "images_per_s", "size", "threads", "machine"),
}


def plot_results(paths: Sequence[Path], target: Path) -> None:
    """Draw results of one benchmark as a PNG.

    Raises:
        ConfigError: a file is no result, or of another benchmark than the first.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = [_read(path) for path in paths]
    kinds = {result["benchmark"] for result in results}
    if len(kinds) > 1:
        raise ConfigError(f"results of {' and '.join(sorted(kinds))} do not go into one picture; plot them apart")
    drawers = {"classifier": _draw_classifier, "loader": _draw_loader, "backfill": _draw_backfill}
    draw = (drawers | {"scaling": _draw_scaling})[kinds.pop()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    draw(figure, axes, results)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return {key: result[key] for key in ("benchmark", *KEYS[result["benchmark"]])}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is no result of jobs/benchmark.py; write one with --json") from None


def _draw_classifier(figure: Any, axes: Any, results: list[dict[str, Any]]) -> None:
    """Milliseconds a step and memory beyond weights and momentum over the number of classes."""
    results = sorted(results, key=lambda result: int(result["classes"]))
    for name in sorted({name for result in results for name in result["step_ms"]}):
        own = [result for result in results if name in result["step_ms"]]
        classes = [result["classes"] for result in own]
        axes[0].plot(classes, [result["step_ms"][name] for result in own], "o-", label=name)
        axes[1].plot(classes, [result["extra_bytes"][name] / 1e6 for result in own], "o-", label=name)
    axes[0].set(title="one training step", xlabel="identities", ylabel="milliseconds")
    axes[1].set(title="memory beyond weights and momentum", xlabel="identities", ylabel="MB")
    for each in axes:
        each.set(xscale="log", yscale="log")
        each.grid(alpha=0.3)
        each.legend()
    first = results[0]
    figure.suptitle(f"D = {first['dim']}, batch {first['batch']}, {first['machine']['device']}", fontsize=10)


def _draw_loader(figure: Any, axes: Any, results: list[dict[str, Any]]) -> None:
    """Images a second of each way, one half a result."""
    for each, result in zip(axes, results[:2], strict=False):
        ways = list(result["images_per_s"])
        bars = each.barh(ways[::-1], [result["images_per_s"][way] for way in ways[::-1]], color="tab:blue")
        bars[-1].set_color("tab:orange")  # ours
        each.bar_label(bars, fmt="{:,.0f}", padding=3)
        each.set(title=f"augmentation: {result['augment']}", xlabel="images a second")
        each.margins(x=0.2)
        each.locator_params(axis="x", nbins=5)
    first = results[0]
    figure.suptitle(
        f"{first['size']} x {first['size']}, {first['threads']} threads, {first['machine']['device']}", fontsize=10
    )


def _draw_backfill(figure: Any, axes: Any, results: list[dict[str, Any]]) -> None:
    """Rank-1 over the share that has moved, one half an order."""
    first = results[0]
    old, new = first["generations"]
    for each, (order, curves) in zip(axes, first["rank1"].items(), strict=True):
        each.plot(first["shares"], [100 * one for one in curves["scaled"]], "o-", color="tab:orange", label="one scale")
        each.plot(first["shares"], [100 * one for one in curves["raw"]], "--", color="tab:blue", label="raw cosines")
        each.set(title=f"order: {order}", xlabel=f"share of the gallery that is {new}'s", ylabel="rank-1, %")
        each.grid(alpha=0.3)
        each.legend()
    figure.suptitle(f"queries of {new} on a gallery of {first['keys']:,} that moves from {old} to {new}", fontsize=10)


def _draw_scaling(figure: Any, axes: Any, results: list[dict[str, Any]]) -> None:
    """A step with and without communication, and where its time goes, over the number of processes."""
    first = results[0]
    worlds = list(first["step_ms"])
    places = range(len(worlds))
    for shift, key, label, colour in (
        (-0.2, "alone_ms", "without", "tab:blue"),
        (0.2, "step_ms", "with", "tab:orange"),
    ):
        axes[0].bar([place + shift for place in places], [first[key][world] for world in worlds], 0.4, color=colour)
        axes[0].bar(0, 0, color=colour, label=f"{label} communication")
    for place, world in zip(places, worlds, strict=True):
        highest = max(first["step_ms"][world], first["alone_ms"][world])
        axes[0].annotate(f"{first['efficiency'][world]:.0%}", (place, highest), ha="center", va="bottom")
    axes[0].set(title="a step (and efficiency)", xlabel="processes", ylabel="milliseconds")
    base = [0.0] * len(worlds)
    for part in first["parts_ms"][worlds[-1]]:
        heights = [first["parts_ms"][world].get(part, 0.0) for world in worlds]
        axes[1].bar(places, heights, 0.6, bottom=base, label=part)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes[1].set(title="with communication, by part", xlabel="processes", ylabel="milliseconds")
    for each in axes:
        each.set_xticks(places, worlds)
        each.margins(y=0.15)
        each.grid(alpha=0.3, axis="y")
        each.set_axisbelow(True)
        each.legend(fontsize=8, loc="upper left")
    what = f"{first['backbone']}, {first['batch']} images and {first['rows']:,} prototypes a rank"
    figure.suptitle(f"{what}, {first['machine']['cores']} cores", fontsize=10)
