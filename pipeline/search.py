"""A gallery of one or several generations behind one query.

A query of a generation may search the vectors of another one only if a verdict allows it (`stamp.Verdicts`). Its score
with an item is their cosine in the item's own dimension: a query of more dimensions is compared by its leading values,
renormalised (Shen et al. 2020, section 3.4). Where a gallery holds several generations, the scores of the older ones
are brought to the scale of the newest before all are put in one order (`gallery.scale`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.embedding_files import repeated
from pipeline.errors import DataError
from pipeline.evaluation.exact import Rows, blocks
from pipeline.gallery.hits import Hits
from pipeline.gallery.index import IndexConfig, Segment
from pipeline.gallery.scale import Scale, scales_of
from pipeline.gallery.store import GalleryFolder, GalleryRecord
from pipeline.stamp import Stamp, Verdicts
from pipeline.vectors import Vectors

QUERIES = 1 << 12  # searched at a time


@dataclass(frozen=True)
class Gallery:
    """Vectors that queries search. It never changes: `with_part` and `load` give another one.

    Attributes:
        segments: oldest first; every key is live in exactly one of them.
        config: how parts are indexed.
    """

    segments: tuple[Segment, ...]
    config: IndexConfig

    @classmethod
    def of(cls, vectors: Sequence[Vectors], config: IndexConfig | None = None) -> Self:
        """Index vectors, those of a generation together.

        Raises:
            DataError: a key comes in two of them; a vector is not finite, or zero.
        """
        config = config or IndexConfig()
        if (twice := repeated(pa.chunked_array([one.keys for one in vectors]))) is not None:
            raise DataError(f"key {twice!r} comes in two of the vector files: a gallery holds one vector a key")
        by_stamp: dict[Stamp, list[Vectors]] = {}
        for one in vectors:
            by_stamp.setdefault(one.stamp, []).append(one)
        return cls(tuple(Segment.of(_together(parts), config) for parts in by_stamp.values()), config)

    @classmethod
    def folded(cls, parts: Iterable[Segment], config: IndexConfig) -> Self:
        """Of parts in order: a key belongs to the last part that has it."""
        gallery = cls((), config)
        for part in parts:
            gallery = gallery.with_part(part)
        return gallery

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a gallery that `save` wrote, as it is now; a backfill may be going on.

        Raises:
            DataError: there is none, or a file is missing, cut or changed.
        """
        place = GalleryFolder(folder)
        record = place.read()
        while True:
            try:
                return cls.folded((place.segment(part, record.index) for part in record.parts), record.index)
            except DataError:
                # A part may be gone because the gallery went on without it since its record was read.
                if (newer := place.read()) == record:
                    raise
                record = newer

    def save(self, folder: Path) -> None:
        """Write the gallery to a folder that has none; it is there whole or not at all.

        Raises:
            DataError: the folder has one, or another process writes one.
        """
        place = GalleryFolder(folder)
        with place.locked(new=True):
            if place.record_file.exists():
                raise DataError(f"{folder} holds a gallery already; choose another folder, or delete this one")
            parts = tuple(place.write(segment) for segment in self.joined().segments)
            place.commit(GalleryRecord(index=self.config, parts=parts))

    def __len__(self) -> int:
        """Number of keys."""
        return sum(segment.live for segment in self.segments)

    def keys(self) -> pa.Array:
        """(N,) large strings, all keys, segment by segment."""
        return self._column("keys")

    def identities(self) -> pa.Array:
        """(N,) large strings, the identity of each key, empty where it is not known."""
        return self._column("identities")

    def _column(self, name: str) -> pa.Array:
        parts = [getattr(one, name).filter(pa.array(one.live_N)) for one in self.segments]
        return pa.concat_arrays([pa.array([], pa.large_string()), *parts])

    def generations(self) -> dict[str, int]:
        """How many keys each generation has, oldest first."""
        counts: dict[str, int] = {}
        for segment in self.segments:
            if segment.live:
                counts[segment.stamp.generation] = counts.get(segment.stamp.generation, 0) + segment.live
        return counts

    def __str__(self) -> str:
        """`1,000 keys: 400 of v1, 600 of v2`."""
        counts = ", ".join(f"{count:,} of {name}" for name, count in self.generations().items())
        return f"{len(self):,} keys: {counts}"

    @cached_property
    def scales(self) -> Mapping[Stamp, Scale]:
        """What the cosines of older generations become."""
        return scales_of(self.segments)

    def with_part(self, part: Segment) -> Self:
        """The gallery after a swap: the part's keys are found in it, and no longer where they were."""
        return type(self)((*(one.without(part.keys) for one in self.segments), part), self.config)

    def first(self, count: int) -> Self:
        """The gallery as its first `count` parts made it."""
        return self.folded((segment.whole() for segment in self.segments[:count]), self.config)

    def joined(self) -> Self:
        """The same vectors with one segment a generation, and nothing in it that is not searched."""
        by_stamp: dict[Stamp, list[Segment]] = {}
        for segment in self.segments:
            if segment.live:
                by_stamp.setdefault(segment.stamp, []).append(segment)
        return type(self)(tuple(_join(parts, self.config) for parts in by_stamp.values()), self.config)

    def require(self, stamp: Stamp, verdicts: Verdicts) -> None:
        """Refuse queries that may not search all of the gallery.

        Raises:
            DataError: a verdict is missing or says no, or the queries have fewer dimensions than a segment.
        """
        for segment in self.segments:
            if not segment.live:
                continue
            verdicts.require(stamp, segment.stamp)
            if stamp.dim < segment.stamp.dim:
                raise DataError(
                    f"queries of {stamp.generation!r} have {stamp.dim} dimensions, the gallery of "
                    f"{segment.stamp.generation!r} has {segment.stamp.dim}: embed the queries by a generation with at "
                    "least as many"
                )

    def search(self, queries: Vectors, k: int, verdicts: Verdicts) -> Hits:
        """Find the k nearest items of each query, over all generations of the gallery.

        Args:
            queries: Q vectors of one generation, of any length.
            k: at least 1; fewer items are found in a smaller gallery.
            verdicts: of the family.

        Raises:
            DataError: as `require`; or a query is not finite, or zero in the values that are compared.
        """
        self.require(queries.stamp, verdicts)
        return self.nearest(queries.vectors_ND, k)

    def nearest(self, vectors_QD: npt.NDArray[np.floating], k: int) -> Hits:
        """As `search`, whatever the stamps say."""
        return search_segments(self.segments, vectors_QD, k, self.scales)


def search_segments(
    segments: Sequence[Segment],
    vectors_QD: npt.NDArray[np.floating],
    k: int,
    scales: Mapping[Stamp, Scale] = MappingProxyType({}),
) -> Hits:
    """Find the k nearest over some segments, whatever their stamps say.

    Args:
        segments: each of at most D dimensions.
        vectors_QD: (Q, D) queries of any length.
        k: at least 1.
        scales: of the generations whose cosines are not to be compared as they are.

    Raises:
        DataError: a query is not finite, or zero in the values that are compared.
    """
    assert k >= 1, f"k is {k}"
    searched = [segment for segment in segments if segment.live]
    assert searched, "an empty gallery"
    rows = {dim: Rows.of(vectors_QD[:, :dim], "query") for dim in {segment.stamp.dim for segment in searched}}
    found = []
    for block in blocks(len(vectors_QD), QUERIES):
        unit = {dim: one[block].unit() for dim, one in rows.items()}
        parts = [segment.search(unit[segment.stamp.dim], k) for segment in searched]
        told = [
            one.scaled(scales[segment.stamp]) if segment.stamp in scales else one
            for segment, one in zip(searched, parts, strict=True)
        ]
        found.append(Hits.merged(told, k))
    return Hits.stacked(found)


def _join(segments: Sequence[Segment], config: IndexConfig) -> Segment:
    if len(segments) == 1 and segments[0].live == len(segments[0].keys):
        return segments[0]
    return Segment.of(_together([segment.live_vectors() for segment in segments]), config)


def _together(parts: Sequence[Vectors]) -> Vectors:
    """Vectors of one stamp, one after the other."""
    return Vectors(
        parts[0].stamp,
        pa.concat_arrays([part.keys for part in parts]),
        pa.concat_arrays([part.identities for part in parts]),
        np.concatenate([part.vectors_ND for part in parts]),
    )
