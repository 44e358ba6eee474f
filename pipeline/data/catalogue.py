"""The catalogue: where every sample of a data set stands, and whose it is; 16 bytes each, mapped, never parsed."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.shards import ShardIndex
from pipeline.errors import DataError
from pipeline.files import write_atomically

FILE_NAME = "catalogue.npy"
# First byte of the image in its tar, its bytes, and its identity's row in the data set's table.
RECORD = np.dtype([("offset", "<i8"), ("size", "<u4"), ("row", "<i4")])

Records = npt.NDArray[np.void]


class Catalogue:
    """The samples of all shards, shard after shard, as they stand in the tars.

    Attributes:
        records: (N,) of RECORD, mapped from the file.
        starts: (S + 1,) where each shard's samples begin among them.
    """

    def __init__(self, records: Records, shard_samples: npt.NDArray[np.int64]) -> None:
        self.records = records
        self.starts = np.concatenate([[0], np.cumsum(shard_samples, dtype=np.int64)])
        assert len(records) == self.starts[-1], "one record a sample"

    def shard(self, number: int) -> Records:
        """Records of one shard."""
        return self.records[self.starts[number] : self.starts[number + 1]]

    @classmethod
    def load(cls, folder: Path, shard_samples: npt.NDArray[np.int64]) -> Catalogue:
        """Map the catalogue of a packed data set.

        Args:
            folder: of the data set.
            shard_samples: (S,) samples of each shard, as the manifest has them.

        Raises:
            DataError: it is missing, or not of these shards.
        """
        path = folder / FILE_NAME
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"catalogue {path} is missing; restore it, or delete the folder and pack again") from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"catalogue {path} cannot be read: {error}; restore it, or pack again") from None
        expected = int(shard_samples.sum())
        if records.dtype != RECORD or records.shape != (expected,):
            raise DataError(f"catalogue {path} does not list the manifest's {expected} samples; pack again")
        return cls(records, shard_samples)


def records_of(index: ShardIndex) -> Records:
    """(N,) records of a shard whose index was read."""
    records = np.empty(len(index), RECORD)
    records["offset"], records["size"], records["row"] = index.offsets, index.sizes, index.rows
    return records


def save_catalogue(folder: Path, shards: Iterable[Records]) -> None:
    """Write the records of all shards, in order; a reader sees the old file or the whole new one."""
    stream = io.BytesIO()
    np.save(stream, np.concatenate([np.empty(0, RECORD), *shards]))
    write_atomically(folder / FILE_NAME, stream.getvalue())
