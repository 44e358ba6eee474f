"""Reading samples from shards by (shard, place), and saying which of them are broken."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

import numpy as np
from PIL import Image

from pipeline.data.manifest import Manifest
from pipeline.data.order import Ints
from pipeline.data.preprocess import Draws
from pipeline.data.shards import ShardIndex, index_path
from pipeline.errors import DataError
from pipeline.identities import NO_ROW

UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)  # as Pillow raises
INDICES = 256  # parsed indices kept, about 80 KB each at 4,096 samples a shard; opening a block should not stall


@dataclass(frozen=True)
class BadSample:
    """A sample that does not decode: its shard, place there (of those that take part), key, and the decoder's words."""

    shard: str
    place: int
    key: str
    reason: str


class UndecodableError(DataError):
    """A batch holds samples that do not decode; `samples` lists them and `step` is the batch's number."""

    def __init__(self, samples: list[BadSample], step: int) -> None:
        first = samples[0]
        more = f" (and {len(samples) - 1} more of this batch)" if len(samples) > 1 else ""
        super().__init__(
            f"sample {first.key!r} of shard {first.shard}{more} does not decode: {first.reason}; "
            "mend or remove it and pack the data again"
        )
        self.samples, self.step = samples, step


@dataclass(frozen=True)
class Work:
    """A batch on its way through the decoder; it keeps alive the buffers that DALI reads without a copy."""

    step: int
    shards_B: Ints
    places_B: Ints
    labels_B: Ints
    raws: list[bytes]
    draws: Draws | None = None


@dataclass(frozen=True)
class _OpenShard:
    """One shard's file, and where its samples that take part stand in it."""

    file: int
    offsets: Ints
    sizes: Ints
    labels: Ints


def pillow_refuses(raw: bytes) -> str | None:
    """Why Pillow does not decode an image, in one line; None if it does."""
    try:
        Image.open(io.BytesIO(raw)).load()
    except UNDECODABLE as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


class ShardReader:
    """Reads samples by (shard, place), holding at most `limit` shards open.

    Args:
        folder: of the data set.
        manifest: of the data set.
        rows: (C_manifest,) label of each of the manifest's identities, NO_ROW for those that take no part.
        limit: shards open at once.
    """

    def __init__(self, folder: Path, manifest: Manifest, rows: Ints, limit: int) -> None:
        self._folder, self._manifest, self._rows, self._limit = folder, manifest, rows, limit
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._index = lru_cache(maxsize=INDICES)(self._load_index)

    def sizes(self) -> Ints:
        """(S,) samples of each shard that take part; reads every index only if some identity does not."""
        entries = self._manifest.shards
        if (self._rows != NO_ROW).all():
            return np.array([entry.samples for entry in entries], np.int64)
        counts = ((self._rows[self._index(shard).rows] != NO_ROW).sum() for shard in range(len(entries)))
        return np.fromiter(counts, np.int64, count=len(entries))

    def read(self, step: int, shards_B: Ints, places_B: Ints) -> Work:
        """Read the samples at (shard, place among those that take part).

        Raises:
            DataError: a shard is missing or shorter than its index says.
        """
        labels_B, raws = np.empty(len(shards_B), np.int64), [b""] * len(shards_B)
        for shard in np.unique(shards_B).tolist():
            view, in_shard = self._view(shard), np.flatnonzero(shards_B == shard)
            places = places_B[in_shard]
            labels_B[in_shard] = view.labels[places]
            spans = zip(in_shard.tolist(), view.offsets[places].tolist(), view.sizes[places].tolist(), strict=True)
            for slot, offset, size in spans:
                raws[slot] = os.pread(view.file, size, offset)
                if len(raws[slot]) != size:
                    raise DataError(f"shard {self._path(shard)} ends before its index says; pack or fetch it again")
        return Work(step, shards_B, places_B, labels_B, raws)

    def bad_samples(self, work: Work, refuses: Callable[[bytes], str | None]) -> list[BadSample]:
        """Those samples of a batch that a decoder refuses; it is asked with the bytes, and answers with the reason."""
        bad = []
        for shard, place, raw in zip(work.shards_B.tolist(), work.places_B.tolist(), work.raws, strict=True):
            reason = refuses(raw)
            if reason is not None:
                view = self._view(shard)
                header = os.pread(view.file, BLOCKSIZE, int(view.offsets[place]) - BLOCKSIZE)
                key = TarInfo.frombuf(header, "utf-8", "surrogateescape").name
                bad.append(BadSample(self._manifest.shards[shard].name, place, key, reason))
        return bad

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _path(self, shard: int) -> Path:
        return self._folder / self._manifest.shards[shard].name

    def _load_index(self, shard: int) -> ShardIndex:
        path = self._path(shard)
        index = ShardIndex.load(path, index_path(path), len(self._rows))
        if len(index.rows) != self._manifest.shards[shard].samples:
            raise DataError(
                f"index of shard {path} lists {len(index.rows)} samples, the manifest "
                f"{self._manifest.shards[shard].samples}; restore both or pack the data again"
            )
        return index

    def _view(self, shard: int) -> _OpenShard:
        """Open a shard, or find it open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == self._limit:
            os.close(self._open.popitem(last=False)[1].file)
        index = self._index(shard)
        labels = self._rows[index.rows]
        chosen = np.flatnonzero(labels != NO_ROW)
        try:
            file = os.open(self._path(shard), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {self._path(shard)} cannot be opened: {error.strerror}; fetch it again") from None
        self._open[shard] = _OpenShard(file, index.offsets[chosen], index.sizes[chosen], labels[chosen])
        return self._open[shard]
