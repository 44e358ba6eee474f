"""A picture of a training on more and more GPUs."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline.files import write_atomically
from pipeline.planning.scale import ScalePlan, efficiency, waiting_seconds
from pipeline.planning.search import Estimate

# Okabe and Ito's palette, told apart by people with any common colour blindness.
PARTS = {
    "backbone": ("backbone", "#0072B2"),
    "classifier": ("classifier", "#56B4E9"),
    "parents": ("parents", "#009E73"),
    "row update": ("row update, sampling", "#CC79A7"),
    "exchange": ("exchange of features, row gradients", "#E69F00"),
    "backbone gradients": ("backbone's gradients", "#D55E00"),
    "loader": ("loader, checkpoint", "#555555"),
}
DPI = 144


def draw_scale(plan: ScalePlan, path: Path) -> None:
    """Images a second and the parts of a step over the number of GPUs, as a PNG; only what fits is drawn."""
    points = [one for one in plan.points if one.fits]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    speeds, steps = figure.subplots(1, 2)
    _draw_speed(speeds, points)
    _draw_steps(steps, points)
    first = points[0]
    figure.suptitle(
        f"{plan.config.identities:,} identities, D = {plan.config.dim}, {plan.config.backbone.name}, "
        f"{first.batch // first.setting.ranks} images a GPU, sample rate {first.setting.sample_rate:g}: "
        f"predicted for {plan.config.gpu}, {plan.config.gpus_per_node} a node",
        fontsize=11,
    )
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.getvalue())


def _draw_speed(axes: Axes, points: list[Estimate]) -> None:
    gpus = [one.setting.ranks for one in points]
    speed = [one.batch / one.step_seconds for one in points]
    ideal = [speed[0] * count / gpus[0] for count in gpus]
    axes.plot(gpus, ideal, "--", color="grey", label=f"{gpus[0]} GPUs' speed, multiplied")
    axes.plot(gpus, speed, "o-", color="#0072B2", label="predicted")
    for one, height in zip(points, speed, strict=True):
        axes.annotate(
            f"{efficiency(one):.0%}", (one.setting.ranks, height), (4, -14), textcoords="offset points", fontsize=8
        )
    axes.set(title="speed (and efficiency)", xlabel="GPUs", ylabel="images a second", xscale="log", yscale="log")
    axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.1, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_steps(axes: Axes, points: list[Estimate]) -> None:
    places = range(len(points))
    base = [0.0] * len(points)
    for part, (label, colour) in PARTS.items():
        heights = [1e3 * _part(one, part) for one in points]
        if any(heights):
            axes.bar(places, heights, 0.7, bottom=base, color=colour, label=label)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_xticks(places, [f"{one.setting.ranks:,}" for one in points])
    axes.set(title="a step", xlabel="GPUs", ylabel="milliseconds")
    axes.set_ylim(0, 1.3 * max(base))
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.legend(ncols=2, loc="upper left", fontsize=9)


def _part(one: Estimate, name: str) -> float:
    """Seconds of a bar's part."""
    if name == "exchange":
        return waiting_seconds(one) - one.seconds["backbone gradients"]
    beside = {"row update": "sampling", "loader": "checkpoint"}.get(name)
    return one.seconds[name] + (one.seconds[beside] if beside else 0.0)
