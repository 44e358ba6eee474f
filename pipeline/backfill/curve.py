"""How good a gallery is while it is embedded again: a point a batch, kept in backfill.json and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pydantic
from matplotlib.figure import Figure
from pydantic import Field

from pipeline.backfill.order import best_scores
from pipeline.errors import DataError
from pipeline.evaluation.metrics import Int64
from pipeline.evaluation.plots import COLOURS, PERCENT, save_figure
from pipeline.files import write_json
from pipeline.gallery.hits import Hits
from pipeline.schema import Config
from pipeline.search import Gallery
from pipeline.stamp import Stamp
from pipeline.vectors import Vectors


class Point(Config):
    """A gallery at one moment of its backfill."""

    moved: int = Field(ge=0, description="keys that the new generation has")
    share: float = Field(ge=0, le=1, description="of all keys")
    rank1: float | None = Field(None, description="of the new generation's queries; none: no queries were given")


class Curve(Config):
    """What `backfill.json` says."""

    new: str = Field(description="name of the generation that embeds the gallery again")
    digest: str = Field(description="of it")
    order: str = Field(description="of the last run")
    points: tuple[Point, ...] = ()


class Judge:
    """Measures rank-1 of queries on a gallery as it is searched, by its index.

    Rank-1 is the share of mated queries whose nearest item is of their identity and scores above every item of another
    one; a query's own key is not compared. Mated is a query with another item of its identity in the gallery.

    Args:
        queries: of the new generation.
        gallery: at any moment of the backfill; its keys do not change.

    Raises:
        DataError: an identity is not known, or no query has a mate.
    """

    def __init__(self, queries: Vectors, gallery: Gallery) -> None:
        identities_Q = queries.identities.to_numpy(zero_copy_only=False)
        if (unknown := identities_Q == "").any():
            raise DataError(
                f"query {queries.keys[int(np.argmax(unknown))].as_py()!r} has no identity: the accuracy cannot be "
                "measured; leave --queries out, or embed a data set with identities"
            )
        mated = np.flatnonzero(_mates(queries, gallery) > 0)
        if not len(mated):
            raise DataError(
                f"none of the {len(queries):,} queries has an item of its identity in the gallery: the accuracy cannot "
                "be measured; leave --queries out, or give others"
            )
        self.queries = queries.take(mated)

    def rank1(self, gallery: Gallery) -> float:
        """Share in [0, 1]."""

        def find(place_q: Int64, k: int) -> Hits:
            return gallery.nearest(self.queries.vectors_ND[place_q], k)

        keys_Q, identities_Q = (
            column.to_numpy(zero_copy_only=False) for column in (self.queries.keys, self.queries.identities)
        )
        mate_Q, other_Q = best_scores(find, keys_Q, identities_Q, len(gallery))
        return float(np.mean(mate_Q > other_Q))


def _mates(queries: Vectors, gallery: Gallery) -> Int64:
    """(Q,) items of each query's identity, its own key left out."""
    identities, keys = gallery.identities(), gallery.keys()
    counts = identities.value_counts()
    place = pc.index_in(queries.identities, value_set=counts.field("values"))
    count_Q = np.where(
        place.is_valid().to_numpy(zero_copy_only=False),
        counts.field("counts").to_numpy()[place.fill_null(0).to_numpy()],
        0,
    )
    own = pc.index_in(queries.keys, value_set=keys)
    same = pc.equal(identities.take(own), queries.identities).fill_null(False)
    mates_Q: Int64 = count_Q - same.to_numpy(zero_copy_only=False)
    return mates_Q


def curve_file(folder: Path) -> Path:
    """Where the curve of a gallery's backfill is kept."""
    return folder / "backfill.json"


def read_curve(folder: Path, new: Stamp, order: str, moved: int) -> Curve:
    """The curve so far: of the same new generation, and only what lies behind; a rollback makes points void.

    Raises:
        DataError: the file was changed by hand and cannot be read.
    """
    path = curve_file(folder)
    fresh = Curve(new=new.generation, digest=new.digest, order=order)
    if not path.exists():
        return fresh
    try:
        known = Curve.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise DataError(f"{path} cannot be read ({error.errors()[0]['msg']}); delete it") from None
    if known.digest != new.digest:
        return fresh
    return fresh.model_copy(update={"points": tuple(point for point in known.points if point.moved < moved)})


def with_point(curve: Curve, folder: Path, gallery: Gallery, moved: int, judge: Judge | None) -> Curve:
    """Measure, and keep the point."""
    rank1 = None if judge is None else judge.rank1(gallery)
    point = Point(moved=moved, share=moved / len(gallery), rank1=rank1)
    curve = curve.model_copy(update={"points": (*curve.points, point)})
    write_json(curve_file(folder), curve.model_dump(mode="json"))
    return curve


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw rank-1 over the share that is embedded again, as PNG; nothing where it was never measured."""
    points = [(point.share, point.rank1) for point in curve.points if point.rank1 is not None]
    if not points:
        return
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    label = f"queries of {curve.new}, order {curve.order}"
    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[0], linewidth=2.0, label=label)
    axes.set_title(f"Backfill to {curve.new}, as far as it is")
    axes.set_xlabel("share of the gallery embedded by the new model")
    axes.set_ylabel("rank1")
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(visible=True, color="0.88")
    axes.legend(loc="best")
    save_figure(figure, path)
