"""The picture of a generation's lineage, as PNG: generations as nodes, verdicts on the edges.

Time runs to the right. Edges to parents are solid and above, those to older ancestors dashed and below. What holds is
green and has a tick, what failed is red and has a cross, what was not judged is grey and has a question mark: nothing
rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Curve

from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.plots import save_figure

HELD, FAILED, UNJUDGED = "#009E73", "#D55E00", "0.45"  # Okabe and Ito's green and vermilion, grey
MOST = 8  # nodes
STEP = 2.2  # between two nodes, in units of the axes
UNITS_AN_INCH = 1.2
EDGE, GAP = 0.2, 0.08  # half the height of a node; between it and an arrow
RISE = 0.36  # of an arc, for each node that it spans
APART = 0.06  # the feet of two arcs at one node
LONGEST = 14  # characters of a name
DASHES = (0, (4, 2))
TICK, CROSS = "\N{CHECK MARK}", "\N{BALLOT X}"

Parents = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Edge:
    """A verdict on a generation and an ancestor: held or not, and a few characters on it."""

    held: bool
    told: str = ""


def plot_lineage(name: str, parents: Parents, edges: Mapping[tuple[str, str], Edge], path: Path) -> None:
    """Draw one generation with its ancestors and descendants, and write it to `path` as PNG.

    Args:
        name: of the generation, whose node is filled.
        parents: of all generations of the family, by name, oldest first; parents that are not among them are left out.
        edges: the verdicts, by (newer, older); a pair of a generation and its ancestor that is missing was not judged.
        path: the PNG; written beside and renamed, an older file is replaced.
    """
    lineage = Lineage(tuple(parents), parents, {})
    shown = _shown(name, lineage)
    place = {one: index * STEP for index, one in enumerate(shown)}
    pairs = [(new, old) for new, old in lineage.upgrades() if new in place and old in place]
    spans = {(new, old): round((place[new] - place[old]) / STEP) for new, old in pairs}
    above = [spans[new, old] for new, old in pairs if old in parents[new]]
    below = [spans[new, old] for new, old in pairs if old not in parents[new]]
    arcs = [span for span in above if span > 1]
    top, bottom = RISE * max(arcs, default=0) + 0.55, RISE * max(below, default=0) + 0.45
    width = max((place[shown[-1]] + STEP + 0.2) / UNITS_AN_INCH, 5.2)
    figure = Figure(figsize=(width, (top + bottom) / UNITS_AN_INCH + (1.1 if pairs else 0.4)), layout="constrained")
    axes = figure.add_subplot()
    middle, half = place[shown[-1]] / 2, width * UNITS_AN_INCH / 2
    axes.set(xlim=(middle - half, middle + half), ylim=(-bottom, top))
    axes.set_aspect("equal")
    axes.set_axis_off()
    for new, old in pairs:
        look = _Look.of(edges.get((new, old)), old in parents[new])
        if spans[new, old] == 1 and old in parents[new]:
            _draw_line(axes, (place[new] - _half_width(new), place[old] + _half_width(old)), look)
        else:
            _draw_arc(axes, place[new], place[old], spans[new, old], look)
    for one in shown:
        _draw_node(axes, place[one], one, own=one == name)
    hidden = len(_related(name, lineage)) - len(shown)
    axes.set_title(f"Lineage of {name}" + (f" ({hidden} more not shown)" if hidden else ""))
    if pairs:
        _add_legend(figure, bool(below))
    save_figure(figure, path)


def _related(name: str, lineage: Lineage) -> list[str]:
    """The generation, its ancestors and its descendants, oldest first."""
    ancestors = lineage.ancestors(name)
    return [one for one in lineage.order if one == name or one in ancestors or name in lineage.ancestors(one)]


def _shown(name: str, lineage: Lineage) -> list[str]:
    """As many of the related as one picture holds: the newest ancestors before the oldest descendants."""
    related = _related(name, lineage)
    own = related.index(name)
    first = max(0, own + 1 - MOST)
    return related[first : first + MOST]


def _words(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[:6]}…{name[-7:]}"


def _font_size(name: str) -> int:
    return 11 if len(_words(name)) < 8 else 8


def _half_width(name: str) -> float:
    """Of a node, in units of the axes: the font is as wide as 0.66 of its height on average."""
    inches = (0.66 * len(_words(name)) + 1.0) * _font_size(name) / 72
    return inches * UNITS_AN_INCH / 2 + GAP


def _draw_node(axes: Axes, x: float, name: str, *, own: bool) -> None:
    box = {
        "boxstyle": "round,pad=0.5",
        "facecolor": "#D7E8F5" if own else "white",
        "edgecolor": "#0072B2" if own else "0.3",
        "linewidth": 2.0 if own else 1.2,
    }
    font = {"size": _font_size(name), "weight": "bold" if own else "normal"}
    axes.text(x, 0, _words(name), ha="center", va="center", fontdict=font, bbox=box, zorder=3)


@dataclass(frozen=True)
class _Look:
    """Of an edge: it leads to a parent or to an older ancestor, and carries a verdict or none."""

    words: str
    colour: str
    is_parent: bool

    @classmethod
    def of(cls, edge: Edge | None, is_parent: bool) -> _Look:
        if edge is None:
            return cls("?", UNJUDGED, is_parent)
        sign, colour = (TICK, HELD) if edge.held else (CROSS, FAILED)
        return cls(f"{sign} {edge.told}".rstrip(), colour, is_parent)

    def arrow(self, curve: Curve) -> FancyArrowPatch:
        return FancyArrowPatch(
            path=curve,
            arrowstyle="-|>",
            mutation_scale=11,
            color=self.colour,
            linewidth=1.8,
            linestyle="-" if self.is_parent else DASHES,
            zorder=2,
        )


def _draw_line(axes: Axes, ends: tuple[float, float], look: _Look) -> None:
    """From the newer to the older beside it, its verdict above."""
    start, end = ends
    axes.add_patch(look.arrow(Curve([(start, 0), (end, 0)])))
    axes.text((start + end) / 2, 0.09, look.words, ha="center", va="bottom", fontsize=8, color=look.colour)


def _draw_arc(axes: Axes, new: float, old: float, span: int, look: _Look) -> None:
    """From the newer to the older, longer ones around shorter ones; the verdict at its top."""
    side = 1 if look.is_parent else -1
    start, inset = side * (EDGE + GAP), 0.3 - APART * min(span, 5)
    rise = side * RISE * span
    feet, high = (new - inset, old + inset), start + rise / 0.75  # a cubic curve's top is 3/4 as high as its handles
    curve = Curve(
        [(feet[0], start), (feet[0], high), (feet[1], high), (feet[1], start)],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )
    axes.add_patch(look.arrow(curve))
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"}
    place = ((new + old) / 2, start + rise)
    axes.text(*place, look.words, ha="center", va="center", fontsize=8, color=look.colour, bbox=box, zorder=4)


def _add_legend(figure: Figure, has_older: bool) -> None:
    signs = [(HELD, f"{TICK} yes"), (FAILED, f"{CROSS} no"), (UNJUDGED, "? not judged")]
    handles = [Line2D([], [], color=colour, linewidth=1.8, label=words) for colour, words in signs]
    handles.append(Line2D([], [], color="0.2", linewidth=1.8, label="parent"))
    if has_older:
        handles.append(Line2D([], [], color="0.2", linewidth=1.8, linestyle=DASHES, label="older"))
    figure.legend(
        handles=handles,
        title="May the newer search the older's gallery? (points gained, first metric judged)",
        title_fontsize=8,
        fontsize=8,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
    )
