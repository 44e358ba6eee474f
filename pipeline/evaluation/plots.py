"""Pictures of an evaluation, as PNG files: DET curves, the compatibility matrix, backfill curves.

Drawn on Agg canvases without pyplot, so that no display and no global state is touched. Series differ by line
style and cells by words as well as by colour, so nothing rests on colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from pipeline.errors import DataError
from pipeline.files import write_atomically

Float64 = npt.NDArray[np.float64]

# Okabe and Ito's palette, told apart by people with any common colour blindness; yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
DPI = 144
CELL_INCHES = 1.15
LEAST_SHARE = 1e-6
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.6g} %")


def plot_det(
    curves: Mapping[str, tuple[Float64, Float64]],
    path: Path,
    bands: Mapping[str, tuple[Float64, Float64, Float64]] | None = None,
) -> None:
    """Draw detection error trade-off curves, both axes logarithmic, and write them to `path` as PNG.

    Args:
        curves: label -> (far, frr), each (K,) shares as `metrics.det_curve` returns them; points where either is
            0 have no place on logarithmic axes and are left out. A curve of such points alone (a model that
            separates all pairs, or none) stands in the legend, with the reason.
        path: the PNG; written beside and renamed, an older file is replaced.
        bands: label -> (far, low, high), each (J,): where the false reject rate lies with 95 % confidence.

    Raises:
        DataError: there is no curve.
    """
    if not curves:
        raise DataError(f"no DET curve to draw in {path}: evaluate at least one pair of generations")
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    least_far = least_frr = 0.1  # the axes span at least a decade
    for index, (label, (far_K, frr_K)) in enumerate(curves.items()):
        assert far_K.shape == frr_K.shape, f"{label}: far {far_K.shape} and frr {frr_K.shape} differ"
        shown_K = (far_K > 0) & (frr_K > 0)
        least_far = min(least_far, float(far_K[shown_K].min(initial=1.0)))
        least_frr = min(least_frr, float(frr_K[shown_K].min(initial=1.0)))
        axes.plot(
            far_K[shown_K],
            frr_K[shown_K],
            label=label if shown_K.any() else f"{label} (never both errors above 0)",
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index % len(STYLES)],
            linewidth=2.0,
        )
        if label in (bands or {}):
            far_J, low_J, high_J = (bands or {})[label]
            drawn_J = (far_J > 0) & (high_J > 0)
            floor_J = np.maximum(low_J, LEAST_SHARE)  # a band down to nought has no lower edge on this axis
            colour = COLOURS[index % len(COLOURS)]
            axes.fill_between(far_J[drawn_J], floor_J[drawn_J], high_J[drawn_J], color=colour, alpha=0.18, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(least_far / 1.3, 1.3), ylim=(max(least_frr, 1e-3) / 1.3, 1.3))
    told = ", 95 % bands" if bands else ""
    axes.set_title(f"Detection error trade-off (query model/gallery model){told}")
    axes.set_xlabel("false accept rate (share of impostor pairs)")
    axes.set_ylabel("false reject rate (share of genuine pairs)")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(visible=True, which="major", color="0.82")
    axes.grid(visible=True, which="minor", color="0.93", linewidth=0.5)
    # Beside the axes: a curve may pass through every corner.
    axes.legend(title="query/gallery", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save_figure(figure, path)


def plot_matrix(
    names: Sequence[str],
    values_QG: Float64,
    metric: str,
    path: Path,
    criterion: Mapping[str, bool] | None = None,
) -> None:
    """Draw M[query generation, gallery generation] of one metric and write it to `path` as PNG.

    Args:
        names: the generations, oldest first.
        values_QG: (len(names), len(names)); row: the query's model, column: the gallery's; NaN: not measured.
        metric: its name, for the title and the colour scale.
        path: the PNG; written beside and renamed, an older file is replaced.
        criterion: "query/gallery" -> does the compatibility criterion hold (`compatibility.Report.criterion`);
            such cells get a frame, solid where it holds and dashed where it fails, and the word.

    Raises:
        DataError: there is no generation, or nothing was measured.
    """
    assert values_QG.shape == (len(names), len(names)), f"{values_QG.shape} values for {len(names)} generations"
    measured = values_QG[~np.isnan(values_QG)]
    if not measured.size:
        raise DataError(f"no pair of generations was measured on {metric}: nothing to draw in {path}")
    side = CELL_INCHES * len(names)
    figure = Figure(figsize=(max(side + 2.4, 5.4), max(side + 1.4, 3.6)), layout="constrained")
    axes = figure.add_subplot()
    low, high = float(measured.min()), float(measured.max())
    margin = 0.02 if low == high else 0.0  # one value alone still needs a scale
    colours = colormaps["cividis"].with_extremes(bad="0.92")
    image = axes.imshow(np.ma.masked_invalid(values_QG), cmap=colours, vmin=low - margin, vmax=high + margin)
    figure.colorbar(image, ax=axes, label=metric, shrink=0.85)
    axes.set_title(f"Compatibility matrix: {metric}")
    axes.set_xlabel("gallery embedded by")
    axes.set_ylabel("query embedded by")
    crowded = max(len(name) for name in names) * len(names) > 40
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.grid(visible=True, which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    middle = (low + high) / 2
    for (row, column), value in np.ndenumerate(values_QG):
        held = (criterion or {}).get(f"{names[row]}/{names[column]}")
        _write_cell(axes, row, column, float(value), "black" if value > middle else "white", held)
    save_figure(figure, path)


def _write_cell(axes: Axes, row: int, column: int, value: float, ink: str, held: bool | None) -> None:
    if np.isnan(value):
        axes.text(column, row, "not\nmeasured", ha="center", va="center", color="0.35", fontsize=9)
        return
    text = f"{value:.3f}"
    if held is not None:
        text += "\ncriterion\n" + ("holds" if held else "fails")
        style = "-" if held else "--"
        # Inset by a little: a frame on the very edge of the axes would be clipped.
        frame = Rectangle(
            (column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor=ink, linewidth=2, linestyle=style
        )
        axes.add_patch(frame)
    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=10)


@dataclass(frozen=True)
class BackfillCurve:
    """One upgrade's figure while its gallery is embedded again.

    Attributes:
        share: of the gallery that is the new model's, ascending from 0 to 1.
        random: the figure at each share, in a random order.
        uncertainty: the figure, the most ambiguous items first.
        old: the old model's own figure; None: not measured.
    """

    share: Sequence[float]
    random: Sequence[float]
    uncertainty: Sequence[float]
    old: float | None


def plot_backfill(curves: Mapping[str, BackfillCurve], metric: str, path: Path) -> None:
    """Draw a metric over the share of the gallery that is embedded again, and write it to `path` as PNG.

    Args:
        curves: "new/old" -> its curve.
        metric: its name.
        path: the PNG; written beside and renamed, an older file is replaced.

    Raises:
        DataError: there is no curve.
    """
    if not curves:
        raise DataError(f"no backfill curve to draw in {path}: evaluate a generation with its parent")
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, curve) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linewidth": 2.0, "markersize": 5}
        old = label.split("/")[1]
        axes.plot(curve.share, curve.uncertainty, "o-", label=f"{label}, most ambiguous first", **look)
        axes.plot(curve.share, curve.random, "s--", label=f"{label}, random order", **look)
        if curve.old is not None:
            axes.axhline(curve.old, color=look["color"], linestyle=":", linewidth=1.4, label=f"{old}/{old}")
    axes.set_title(f"Partial backfill: {metric}")
    axes.set_xlabel("share of the gallery embedded by the new model")
    axes.set_ylabel(metric)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(visible=True, color="0.88")
    axes.legend(title="new/old", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, dpi=DPI, format="png")
    write_atomically(path, picture.getvalue())
