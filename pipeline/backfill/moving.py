"""Backfill: a gallery is embedded again in batches while it is searched.

A batch is one new part and one swap of `gallery.json` (see `pipeline.gallery.store`): the keys that it holds are found
by their new vectors from then on, all others by their old ones. Killed at any moment and run again, a backfill goes on
with the keys that are left. Until it is closed by `prune`, nothing old is deleted, and `roll_back` is one swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.backfill.curve import Curve, Judge, draw_curve, read_curve, with_point
from pipeline.backfill.order import OrderConfig, keys_in_order
from pipeline.console import bar, say
from pipeline.errors import DataError
from pipeline.evaluation.exact import blocks
from pipeline.gallery.index import Segment
from pipeline.gallery.store import GalleryFolder
from pipeline.search import Gallery
from pipeline.stamp import Stamp, Verdicts
from pipeline.vectors import Vectors, read_vectors, vector_files

BATCHES = 20  # of a gallery, unless asked for otherwise


class BackfillConfig(OrderConfig):
    """How a gallery is embedded again."""

    batch: int | None = Field(None, gt=0, description="keys swapped at a time; none: a twentieth of the gallery")
    until: float = Field(1.0, gt=0, le=1, description="share of the gallery to stop at")


class NewVectors(Protocol):
    """Where a gallery's new vectors come from: files, or a model that embeds when asked."""

    @property
    def stamp(self) -> Stamp:
        """Of the new generation."""

    def check(self, keys: pa.Array) -> None:
        """Refuse early what cannot be had.

        Raises:
            DataError: a key has no new vector.
        """

    def __call__(self, keys: pa.Array) -> Vectors:
        """The new vectors of K large strings, in their order."""


@dataclass(frozen=True)
class StoredVectors:
    """New vectors that lie in files (jobs/embed.py)."""

    place: Path
    vectors: Vectors

    @classmethod
    def read(cls, place: Path) -> StoredVectors:
        """Of a file or a folder.

        Raises:
            DataError: as `read_vectors`.
        """
        return cls(place, read_vectors(vector_files(place)))

    @property
    def stamp(self) -> Stamp:
        """Of the new generation."""
        return self.vectors.stamp

    def check(self, keys: pa.Array) -> None:
        """Refuse early what cannot be had.

        Raises:
            DataError: a key has no vector.
        """
        missing = keys.filter(pc.invert(pc.is_in(keys, value_set=self.vectors.keys)))
        if len(missing):
            raise DataError(
                f"{len(missing):,} of {len(keys):,} keys to be moved have no vector in {self.place} (first: "
                f"{missing[0].as_py()!r}); embed them (jobs/embed.py), or stop earlier (--until)"
            )

    def __call__(self, keys: pa.Array) -> Vectors:
        """The new vectors of K large strings, in their order."""
        return self.vectors.take(pc.index_in(keys, value_set=self.vectors.keys).to_numpy().astype(np.int64))


def backfill(
    folder: Path, source: NewVectors, config: BackfillConfig, verdicts: Verdicts, queries: Vectors | None = None
) -> Curve:
    """Embed a gallery again, or go on with it.

    Args:
        folder: of the gallery.
        source: of the new generation's vectors.
        config: the order, the batch, and where to stop.
        verdicts: of the family; the new generation's queries must be allowed on all that is in the gallery.
        queries: of the new generation, with identities: rank-1 is measured after each batch.

    Returns:
        The curve so far, as it is in backfill.json; drawn in backfill.png if there are queries.

    Raises:
        DataError: there is no gallery, or a file of it is missing, cut or changed; another process changes it; a
            backfill to another generation is open; a verdict is missing or says no; a key has no new vector; the
            queries are of another generation, or the accuracy cannot be measured.
    """
    place, new = GalleryFolder(folder), source.stamp
    with place.locked():
        record, gallery = place.read(), Gallery.load(folder)
        base = len(record.parts) if record.base is None else record.base
        for part in record.parts[base:]:
            if part.stamp.digest != new.digest:
                raise DataError(
                    f"{folder}: a backfill to {part.stamp.generation!r} is open, not to {new.generation!r}: keep it as "
                    "it is by --prune, or undo it by --rollback"
                )
        gallery.require(new, verdicts)
        judge = None if queries is None else _judge(queries, new, gallery)
        done = _moved(gallery, new)
        left = _left(gallery.first(base), gallery, new, config)
        left = left[: max(0, round(config.until * len(gallery)) - len(done))]
        source.check(left)
        curve = with_point(read_curve(folder, new, config.order, len(done)), folder, gallery, len(done), judge)
        moved, goal = len(done), len(done) + len(left)
        batch = config.batch or -(-len(gallery) // BATCHES)
        with bar("backfill", goal, "keys") as progress:
            for block in blocks(len(left), batch):
                segment = _segment(gallery, source, left[block.start : block.stop])
                parts = (*record.parts, place.write(segment))
                record = record.model_copy(update={"parts": parts, "base": base})
                place.commit(record)
                gallery, moved = gallery.with_part(segment), moved + len(segment.keys)
                curve = with_point(curve, folder, gallery, moved, judge)
                progress(moved, _words(curve))
        draw_curve(curve, folder / "backfill.png")
    say(f"{folder}: {gallery}")
    return curve


def roll_back(folder: Path) -> None:
    """Make a gallery what it was before the backfill that is open.

    Raises:
        DataError: there is no gallery, none is open, or another process changes it.
    """
    place = GalleryFolder(folder)
    with place.locked():
        record = place.read()
        if record.base is None:
            raise DataError(f"{folder}: no backfill is open; there is nothing to go back to")
        place.swap(record.model_copy(update={"parts": record.parts[: record.base], "base": None}))
    say(f"{folder}: {Gallery.load(folder)}")


def prune(folder: Path) -> None:
    """Close a gallery's backfill as far as it is: delete the old vectors of what has moved, and join what has come.

    From then on there is no way back.

    Raises:
        DataError: there is no gallery, a file of it is missing, cut or changed, or another process changes it.
    """
    place = GalleryFolder(folder)
    with place.locked():
        record, gallery = place.read(), Gallery.load(folder)
        kept = dict(zip(map(id, gallery.segments), record.parts, strict=True))
        # A part that is whole, and its generation's only one, is not written again.
        parts = tuple(kept.get(id(segment)) or place.write(segment) for segment in gallery.joined().segments)
        place.swap(record.model_copy(update={"parts": parts, "base": None}))
    say(f"{folder}: {gallery}")


def _judge(queries: Vectors, new: Stamp, gallery: Gallery) -> Judge:
    if queries.stamp.digest != new.digest:
        raise DataError(
            f"the queries are of generation {queries.stamp.generation!r}, the new vectors of {new.generation!r}: the "
            "curve is that of the new generation's queries; embed them by it"
        )
    return Judge(queries, gallery)


def _moved(gallery: Gallery, new: Stamp) -> pa.Array:
    """The keys that the new generation has."""
    segments = tuple(segment for segment in gallery.segments if segment.stamp.digest == new.digest)
    return Gallery(segments, gallery.config).keys()


def _left(before: Gallery, gallery: Gallery, new: Stamp, config: OrderConfig) -> pa.Array:
    """The keys that are not the new generation's, in the order that they had before the first batch."""
    keys = keys_in_order(before, new, config)
    return keys.filter(pc.invert(pc.is_in(keys, value_set=_moved(gallery, new))))


def _segment(gallery: Gallery, source: NewVectors, keys: pa.Array) -> Segment:
    """New vectors of some keys, with the identities that the gallery knows."""
    vectors = source(keys)
    known = gallery.identities().take(pc.index_in(keys, value_set=gallery.keys()))
    identities = pc.if_else(pc.equal(known, ""), vectors.identities, known)
    return Segment.of(Vectors(vectors.stamp, keys, identities, vectors.vectors_ND), gallery.config)


def _words(curve: Curve) -> str:
    rank1 = curve.points[-1].rank1
    return "" if rank1 is None else f"rank1 {100 * rank1:.1f} %"
