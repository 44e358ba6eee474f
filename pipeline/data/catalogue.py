"""The catalogue: where every sample of a data set stands, and whose it is; 16 bytes each, mapped, never parsed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.data.parsing import PARSING
from pipeline.data.shards import ShardIndex
from pipeline.errors import DataError
from pipeline.redaction import in_short

FILE_NAME = "catalogue.npy"
# First byte of the image in its tar, its bytes, and its identity's row in the data set's table.
RECORD = np.dtype([("offset", "<i8"), ("size", "<u4"), ("row", "<i4")])
# What NumPy raises of a head that is none: it parses Python's own notation.
BROKEN = (OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError, TokenError, OverflowError, TypeError)
WINDOW = 1 << 20  # samples of a pass that are in memory at once: 16 MiB
CHOSEN = 256  # shards of which the places of the samples that take part are kept, 16 KB each at 4,096 samples

Records = npt.NDArray[np.void]
Rows = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Catalogue:
    """The samples of all shards, shard after shard, as they stand in the tars.

    Attributes:
        path: of the file.
        records: (N,) of RECORD, mapped from the file.
        starts: (S + 1,) where each shard's samples begin among them.
    """

    def __init__(self, path: Path, records: np.memmap[Any, Any], shard_samples: Ints) -> None:
        self.path, self.records = path, records
        self.starts = np.concatenate([[0], np.cumsum(shard_samples, dtype=np.int64)])
        assert len(records) == self.starts[-1], "one record a sample"

    def shard(self, number: int) -> Records:
        """Records of one shard."""
        return self.records[self.starts[number] : self.starts[number + 1]]

    def passes(self) -> Iterator[tuple[int, int, Rows]]:
        """Go through the rows of all samples, some whole shards at a time.

        What was passed is given back to the system: a pass over the catalogue does not make it resident.

        Yields:
            The first shard, the one after the last, and the rows of their samples, in order.
        """
        mapped: Any = self.records.base
        edges = np.searchsorted(self.starts, np.arange(0, len(self.records), WINDOW))
        for first, stop in zip(edges, [*edges[1:], len(self.starts) - 1], strict=True):
            if first < stop:
                yield int(first), int(stop), np.array(self.records["row"][self.starts[first] : self.starts[stop]])
            mapped.madvise(mmap.MADV_DONTNEED)

    @classmethod
    def load(cls, folder: Path, shard_samples: Ints) -> Catalogue:
        """Map the catalogue of a packed data set.

        Args:
            folder: of the data set.
            shard_samples: (S,) samples of each shard, as the manifest has them.

        Raises:
            DataError: it is missing, or not of these shards.
        """
        path = folder / FILE_NAME
        try:
            with PARSING:
                records = np.lib.format.open_memmap(path, mode="r")  # no pickle, and no archive
        except FileNotFoundError:
            raise DataError(f"catalogue {path} is missing; restore it, or delete the folder and pack again") from None
        except BROKEN as error:
            raise DataError(f"catalogue {path} cannot be read: {in_short(error)}; restore it, or pack again") from None
        expected = int(shard_samples.sum())
        if records.dtype != RECORD or records.shape != (expected,):
            raise DataError(f"catalogue {path} does not list the manifest's {expected} samples; pack again")
        return cls(path, records, shard_samples)


class Selection:
    """The samples of a catalogue whose identities take part; nothing is kept a sample.

    Args:
        catalogue: of all samples.
        takes_part: (C,) whether each row of the data set's identity table does.
    """

    def __init__(self, catalogue: Catalogue, takes_part: Bools) -> None:
        self._catalogue, self._takes_part, self._all = catalogue, takes_part, bool(takes_part.all())
        self._chosen = lru_cache(maxsize=CHOSEN)(self._find_chosen)

    def sizes(self) -> Ints:
        """(S,) samples of each shard that take part; one pass over the catalogue, if some identity does not.

        Raises:
            DataError: the catalogue names a row that the identity table has not.
        """
        starts = self._catalogue.starts
        if self._all:
            return np.diff(starts)
        counts = np.empty(len(starts) - 1, np.int64)
        for first, stop, rows in self._catalogue.passes():
            chosen = self._takes_part[self._checked(rows, starts[first])]
            counts[first:stop] = np.add.reduceat(chosen, starts[first:stop] - starts[first], dtype=np.int64)
        return counts

    def rows(self) -> Iterator[Rows]:
        """Go through the rows, in the data set's table, of all samples that take part, shard after shard.

        Raises:
            DataError: the catalogue names a row that the identity table has not.
        """
        for first, _, rows in self._catalogue.passes():
            yield rows[self._takes_part[self._checked(rows, self._catalogue.starts[first])]]

    def records_at(self, shards_B: Ints, places_B: Ints) -> Records:
        """(B,) records of the samples at (shard, place among those that take part).

        Raises:
            DataError: the catalogue names a row that the identity table has not.
        """
        if not self._all:
            places_B = self._places_in_shards(shards_B, places_B)
        numbers_B = self._catalogue.starts[shards_B] + places_B
        records_B: Records = np.asarray(self._catalogue.records[numbers_B])
        self._checked(records_B["row"], numbers_B)
        return records_B

    def _places_in_shards(self, shards_B: Ints, places_B: Ints) -> Ints:
        """Turn places among those that take part into places among all."""
        within_B = np.empty(len(places_B), np.int64)
        for shard in np.unique(shards_B).tolist():
            in_shard = np.flatnonzero(shards_B == shard)
            within_B[in_shard] = self._chosen(shard)[places_B[in_shard]]
        return within_B

    def _find_chosen(self, shard: int) -> npt.NDArray[np.int32]:
        """Places in the shard of its samples that take part."""
        rows = self._checked(self._catalogue.shard(shard)["row"], self._catalogue.starts[shard])
        return np.flatnonzero(self._takes_part[rows]).astype(np.int32)

    def _checked(self, rows: Rows, numbers: Ints) -> Rows:
        """The rows, once none is found to be beyond the table; of samples `numbers`, or of those from there on."""
        unsigned = rows.view(np.uint32)  # what is below 0 is beyond the table, too
        if unsigned.max(initial=0) >= len(self._takes_part):
            place = int(unsigned.argmax())
            number = numbers[place] if numbers.ndim else numbers + place
            raise DataError(
                f"catalogue {self._catalogue.path} gives sample {number} row {rows[place]}, but the identity table "
                f"has {len(self._takes_part)} rows; restore it, or pack again"
            )
        return rows


def records_of(index: ShardIndex) -> Records:
    """(N,) records of a shard whose index was read."""
    records = np.empty(len(index), RECORD)
    records["offset"], records["size"], records["row"] = index.offsets, index.sizes, index.rows
    return records


def save_catalogue(folder: Path, shards: Iterable[Records]) -> None:
    """Write the records of all shards, in order; a reader sees the old file or the whole new one."""
    path = folder / FILE_NAME
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as stream:
        count = 0
        _write_head(stream, count)  # as long as the one that takes its place: NumPy leaves room for the number to grow
        for records in shards:
            records.tofile(stream)
            count += len(records)
        stream.seek(0)
        _write_head(stream, count)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _write_head(stream: BinaryIO, count: int) -> None:
    """Write what stands before `count` records in a file of `np.save`."""
    about = {"descr": np.lib.format.dtype_to_descr(RECORD), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, about)
