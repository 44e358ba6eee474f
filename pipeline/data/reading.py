"""Reading samples from shards by (shard, place), and saying which of them are broken.

What a reader knows of a sample it looks up in the mapped catalogue when the sample is read: opening a data set of a
hundred million samples costs what its hundred thousand shards cost.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

import numpy as np
from PIL import Image

from pipeline.data.catalogue import Catalogue, Selection
from pipeline.data.headers import too_large
from pipeline.data.manifest import Manifest
from pipeline.data.order import Ints
from pipeline.data.preprocess import Draws
from pipeline.data.store import LocalStore, ShardFiles
from pipeline.errors import DataError
from pipeline.identities import NO_ROW
from pipeline.redaction import in_short

UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)  # as Pillow raises


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


def pillow_refuses(raw: bytes) -> str | None:
    """Why Pillow does not decode an image, in one line; None if it does."""
    if (reason := too_large(raw)) is not None:
        return reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, which are not too many
        try:
            Image.open(io.BytesIO(raw)).load()
        except UNDECODABLE as error:
            return in_short(error)
    return None


class ShardReader:
    """Reads samples by (shard, place), holding at most `limit` shards open.

    Attributes:
        selection: the samples that take part.

    Args:
        folder: of the data set.
        manifest: of the data set.
        rows: (C_manifest,) label of each of the manifest's identities, NO_ROW for those that take no part.
        limit: shards open at once.
        store: of the tars; None: they lie in the folder.

    Raises:
        DataError: the catalogue is missing, or not of this manifest.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, rows: Ints, limit: int, store: ShardFiles | None = None
    ) -> None:
        assert limit > 0, "a shard is open while it is read"
        self._shards, self._labels, self._limit = manifest.shards, rows, limit
        self._store = store or LocalStore(folder)
        samples = np.fromiter((entry.samples for entry in manifest.shards), np.int64, count=len(manifest.shards))
        self.selection = Selection(Catalogue.load(folder, samples), rows != NO_ROW)
        self._open: OrderedDict[int, int] = OrderedDict()  # files by shard, the one used last at the end
        self._ahead: dict[int, None] = {}  # shards asked for, the first needed first
        self.at = "none yet"  # the shard that was last opened, for whoever has waited too long for it

    def expect(self, shards: Ints) -> None:
        """Ask for the shards that are read now and soon, and let go of all others.

        Args:
            shards: (W,) in the order of need; some may stand twice.
        """
        before, self._ahead = self._ahead, dict.fromkeys(shards.tolist())
        for shard in (before | dict.fromkeys(self._open)).keys() - self._ahead.keys():
            self._let_go(shard)
        if fresh := [self._shards[shard].name for shard in self._ahead if shard not in before]:
            self._store.prefetch(fresh)

    def read(self, step: int, shards_B: Ints, places_B: Ints) -> Work:
        """Read the samples at (shard, place among those that take part).

        Raises:
            DataError: a shard is missing, not of the size that was packed, or shorter than the catalogue says.
        """
        records_B = self.selection.records_at(shards_B, places_B)
        offsets_B, sizes_B = records_B["offset"].tolist(), records_B["size"].tolist()
        raws = [b""] * len(shards_B)
        for shard in np.unique(shards_B).tolist():
            file = self._file(shard)
            for slot in np.flatnonzero(shards_B == shard).tolist():
                raws[slot] = os.pread(file, sizes_B[slot], offsets_B[slot])
                if len(raws[slot]) != sizes_B[slot]:
                    name = self._shards[shard].name
                    raise DataError(f"shard {name} ends before its catalogue says; pack or fetch it again")
        return Work(step, shards_B, places_B, self._labels[records_B["row"]], raws)

    def bad_samples(self, work: Work, refuses: Callable[[bytes], str | None]) -> list[BadSample]:
        """Those samples of a batch that a decoder refuses; it is asked with the bytes, and answers with the reason."""
        reasons_B = [refuses(raw) for raw in work.raws]
        bad = [slot for slot, reason in enumerate(reasons_B) if reason is not None]
        shards, places = work.shards_B[bad], work.places_B[bad]
        found = zip(shards.tolist(), places.tolist(), self.keys(shards, places), bad, strict=True)
        return [BadSample(self._shards[s].name, place, key, reasons_B[slot] or "") for s, place, key, slot in found]

    def keys(self, shards_B: Ints, places_B: Ints) -> list[str]:
        """Names of samples in their tars, in the order asked for.

        Raises:
            DataError: a shard is missing, or not of the size that was packed.
        """
        names = [""] * len(shards_B)
        offsets_B = self.selection.records_at(shards_B, places_B)["offset"].tolist()
        for slot in np.argsort(shards_B, kind="stable").tolist():
            header = os.pread(self._file(int(shards_B[slot])), BLOCKSIZE, offsets_B[slot] - BLOCKSIZE)
            names[slot] = TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        return names

    def close(self) -> None:
        """Close every file, and let go of every shard."""
        self.expect(np.empty(0, np.int64))

    def _file(self, shard: int) -> int:
        """Open a shard, or find it open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == self._limit:
            self._let_go(next(iter(self._open)))
        entry = self._shards[shard]
        self.at = entry.name
        path = self._store.local(entry.name)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}; fetch it again") from None
        if (size := os.fstat(file).st_size) != entry.bytes:
            os.close(file)
            raise DataError(f"shard {path} has {size} bytes, not {entry.bytes}: it changed; pack or fetch it again")
        self._open[shard] = file
        return file

    def _let_go(self, shard: int) -> None:
        """Close a shard if it is open, and release it unless it is needed soon."""
        if (file := self._open.pop(shard, None)) is not None:
            os.close(file)
        if shard not in self._ahead:
            self._store.release(self._shards[shard].name)
