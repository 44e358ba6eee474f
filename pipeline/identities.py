"""Identity tables: the map between an identity's stable string key and its row in a classifier.

Labels of two generations or two data sets are only ever related by key. A position says nothing: v2's
row 7 and v1's row 7 are different people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError

NO_ROW = -1  # "this identity has no row in that table"


@dataclass(frozen=True)
class IdentityTable:
    """An ordered set of identity keys; a key's row is its place in the order.

    Raises:
        DataError: a key stands twice, or the table is empty.
    """

    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise DataError("identity table is empty: no identity to train on")
        if len(self.row_of_key) != len(self.keys):
            seen: set[str] = set()
            twice = next(key for key in self.keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"identity key {twice!r} stands twice in the table; keys must be unique")

    @classmethod
    def from_keys(cls, keys: Iterable[str]) -> IdentityTable:
        """Build the table of the distinct keys, sorted, so that it does not depend on the order of arrival."""
        return cls(tuple(sorted(set(keys))))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def digest(self) -> str:
        """Sha256 of the keys in order; equal digests mean equal labels."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    def rows_of(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows of `keys`, shape (len(keys),), NO_ROW where a key is not in the table."""
        return np.fromiter((self.row_of_key.get(key, NO_ROW) for key in keys), np.int64, count=len(keys))

    def subset(self, count: int, seed: int) -> IdentityTable:
        """Choose `count` identities by a hash of (seed, key), keeping the table's order.

        The choice of a key does not depend on the other keys, and a smaller count is a subset of a larger
        one: the identities of v1 are among those of v2 whenever both are drawn from one table and seed.

        Raises:
            DataError: more identities are asked for than there are.
        """
        if count > len(self):
            raise DataError(f"{count} identities asked for, but the data set has {len(self)}")
        ranked = sorted(self.keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
        chosen = set(ranked[:count])
        return IdentityTable(tuple(key for key in self.keys if key in chosen))

    def save(self, path: Path) -> None:
        """Write the table as Parquet, one row an identity, column `identity`."""
        pq.write_table(pa.table({"identity": pa.array(self.keys, pa.string())}), path)

    @classmethod
    def load(cls, path: Path) -> IdentityTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: the file is missing or has no string column `identity`.
        """
        try:
            column = pq.read_table(path, columns=["identity"]).column("identity")
        except FileNotFoundError:
            raise DataError(f"identity table {path} is missing") from None
        except (pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"identity table {path} cannot be read: {error}") from None
        return cls(tuple(column.to_pylist()))


@dataclass(frozen=True)
class Alignment:
    """Where each row of an old table stands in a new one.

    Attributes:
        new_rows: (C_old,) int64; the new row of each old row, NO_ROW where the identity is gone.
    """

    new_rows: npt.NDArray[np.int64]

    @property
    def gone(self) -> npt.NDArray[np.int64]:
        """Old rows whose identity is not in the new table, ascending."""
        return np.flatnonzero(self.new_rows == NO_ROW).astype(np.int64)

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """Old rows whose identity is in the new table, ordered by their new row."""
        old_rows = np.flatnonzero(self.new_rows != NO_ROW)
        return old_rows[np.argsort(self.new_rows[old_rows], kind="stable")].astype(np.int64)


def align(old: IdentityTable, new: IdentityTable) -> Alignment:
    """Relate two tables by key: the only way a parent's rows are ever read."""
    return Alignment(new.rows_of(old.keys))
