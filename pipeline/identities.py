"""Identity tables: the map between an identity's stable string key and its row in a classifier.

Labels of two generations or two data sets are only ever related by key. A position says nothing: v2's
row 7 and v1's row 7 are different people.

A key may carry the namespace of its data set, as in `ms1m:0000045`. Equal keys of one namespace are one identity;
of bare keys of two data sets nobody knows, so that whoever joins them has to say.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.files import write_atomically
from pipeline.parquet import read_parquet

NO_ROW = -1  # "this identity has no row in that table"
BARE = ""  # stands among a table's namespaces for keys that have none
NAMESPACE = "[A-Za-z0-9][A-Za-z0-9_.-]*"
CHUNK = 1 << 17  # keys that are Python strings at a time

Keys = Literal["same", "distinct"]


class IdentityTable:
    """An ordered set of identity keys; a key's row is its place in the order. It does not change.

    The keys lie in one Arrow array: 10 million of 15 letters take 220 MB and reach a worker without a copy.

    Args:
        keys: strings, or an Arrow array of strings.

    Attributes:
        column: (C,) the keys as an Arrow array of large strings.

    Raises:
        DataError: a key stands twice or is no valid text, or the table is empty.
    """

    def __init__(self, keys: Iterable[str] | pa.Array) -> None:
        self.column = _as_column(keys)
        assert not self.column.null_count, "every identity has a key"
        if not len(self):
            raise DataError("identity table is empty: no identity to train on")
        if (twice := _repeated(self.column)) is not None:
            raise DataError(f"identity key {twice!r} stands twice in the table; keys must be unique")

    @classmethod
    def from_keys(cls, keys: Iterable[str]) -> IdentityTable:
        """Build the table of the distinct keys, sorted, so that it does not depend on the order of arrival."""
        return cls(sorted(set(keys)))

    def __len__(self) -> int:
        return len(self.column)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityTable) and bool(self.column.equals(other.column))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"IdentityTable({len(self)} keys, the first is {self.column[0].as_py()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.column,)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys as Python strings, 70 bytes each and kept: for small tables; large ones are read by `column`."""
        return tuple(self.column.to_pylist())

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Row of each key, 160 bytes each with `keys`, and kept: for small tables; of large ones ask `rows_of`."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def digest(self) -> str:
        """Sha256 of the keys in order; equal digests mean equal labels."""
        digest = hashlib.sha256()
        for number, keys in enumerate(_chunks(self.column)):
            digest.update(("\n" * (number > 0) + "\n".join(keys)).encode())
        return digest.hexdigest()

    @cached_property
    def namespaces(self) -> frozenset[str]:
        """Namespaces that the keys carry; BARE is among them if some carry none."""
        found: set[str] = set()
        for first in range(0, len(self), CHUNK):
            parts = pc.extract_regex(self.column[first : first + CHUNK], f"^(?P<namespace>{NAMESPACE}):")
            names = pc.fill_null(pc.struct_field(parts, "namespace"), BARE)
            found.update(pc.unique(names).to_pylist())
        return frozenset(found)

    def rows_of(self, keys: Sequence[str] | pa.Array) -> npt.NDArray[np.int64]:
        """Rows of `keys`, shape (len(keys),), NO_ROW where a key is not in the table; one pass over the table."""
        if not len(keys):
            return np.empty(0, np.int64)
        wanted = _as_column(keys).dictionary_encode()
        places = pc.fill_null(pc.index_in(self.column, value_set=wanted.dictionary), NO_ROW).to_numpy()
        rows = np.full(len(wanted.dictionary), NO_ROW, np.int64)
        found = np.flatnonzero(places != NO_ROW)
        rows[places[found]] = found
        result: npt.NDArray[np.int64] = rows[wanted.indices.to_numpy()]
        return result

    def subset(self, count: int, seed: int) -> IdentityTable:
        """Choose `count` identities by a hash of (seed, key), keeping the table's order.

        The choice of a key does not depend on the other keys, and a smaller count is a subset of a larger
        one: the identities of v1 are among those of v2 whenever both are drawn from one table and seed.

        Raises:
            DataError: more identities are asked for than there are.
        """
        if count > len(self):
            raise DataError(f"{count} identities asked for, but the data set has {len(self)}")
        chosen = np.zeros(len(self), bool)
        chosen[np.argsort(_hashes(self.column, f"{seed}:"), kind="stable")[:count]] = True
        return self._where(chosen)

    def hold_out(self, share: float, seed: int) -> tuple[IdentityTable, IdentityTable]:
        """Split off about `share` of the identities, those whose hash of (seed, key) is low.

        An identity's side depends on nothing but seed and share: it stays there when others come or go, and what a
        small share holds out a larger one does too.

        Returns:
            The identities that stay and those held out, each in the table's order.

        Raises:
            DataError: one part would be empty.
        """
        assert 0 < share < 1, "a share is between 0 and 1"
        out = _hashes(self.column, f"hold out:{seed}:") < np.uint64(int(share * 2**64))
        if out.all() or not out.any():
            raise DataError(
                f"holding out {share} of {len(self)} identities leaves one part empty; choose another share or seed"
            )
        return self._where(~out), self._where(out)

    def in_namespace(self, namespace: str) -> IdentityTable:
        """Put `namespace:` before every key.

        Raises:
            DataError: the namespace is malformed, or a key has one already.
        """
        if taken := self.namespaces - {BARE}:
            raise DataError(
                f"namespace {namespace!r} cannot be given to keys of namespace {min(taken)!r}; a key has one"
            )
        prefix = pa.scalar(namespaced_key(namespace, ""), pa.large_string())
        return IdentityTable(pc.binary_join_element_wise(prefix, self.column, pa.scalar("", pa.large_string())))

    def _where(self, chosen: npt.NDArray[np.bool_]) -> IdentityTable:
        return IdentityTable(self.column.filter(pa.array(chosen)))

    def save(self, path: Path) -> None:
        """Write the table as Parquet, one row an identity, column `identity`; a reader sees all of it or nothing."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"identity": self.column}), sink)
        write_atomically(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: Path) -> IdentityTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: the file is missing, or its column `identity` is missing, no string column or broken.
        """
        try:
            column = read_parquet(path, ["identity"]).column("identity")
        except FileNotFoundError:
            raise DataError(f"identity table {path} is missing") from None
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise DataError(f"identity table {path} cannot be read: {error}") from None
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
            raise DataError(f"identity table {path} cannot be read: column 'identity' must hold a string in every row")
        try:
            return cls(column.cast(pa.large_string()).combine_chunks())
        except DataError as error:
            raise DataError(f"identity table {path}: {error}") from None


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
    """Relate two tables of one family of data by key: the only way a parent's rows are ever read.

    Tables of two data sets go through `align_across`.
    """
    return Alignment(new.rows_of(old.column))


def align_across(old: IdentityTable, new: IdentityTable, keys: Keys | None = None) -> Alignment:
    """Relate the tables of two data sets; with keys "distinct" every old identity is gone.

    Raises:
        DataError: as `union`, but for equal bare keys: said to be distinct, they are.
    """
    _check_joinable(old, new, keys)
    return Alignment(np.full(len(old), NO_ROW, np.int64)) if keys == "distinct" else align(old, new)


def union(a: IdentityTable, b: IdentityTable, keys: Keys | None = None) -> IdentityTable:
    """Join the identities of two data sets, sorted.

    Args:
        a: one table.
        b: the other.
        keys: "same": an equal key is the same identity; "distinct": no identity is in both. Keys that all carry a
            namespace need nothing said: equal keys are the same, others distinct.

    Raises:
        DataError: bare keys of which nothing is said; keys said to be distinct that share a namespace or are equal.
    """
    _check_joinable(a, b, keys)
    if keys == "distinct" and (shared := _shared(a, b)).any():
        raise DataError(
            f"identity key {a.column[int(np.argmax(shared))].as_py()!r} stands in both tables, whose keys are said to "
            "be distinct; give each data set's keys a namespace"
        )
    return IdentityTable(_sorted(pc.unique(pa.concat_arrays([a.column, b.column]))))


def intersection(a: IdentityTable, b: IdentityTable, keys: Literal["same"] | None = None) -> IdentityTable:
    """Return the identities that two data sets have in common, sorted; `keys` as in `union`.

    Raises:
        DataError: bare keys of which nothing is said, or there is no identity in common.
    """
    _check_joinable(a, b, keys)
    shared = _shared(a, b)
    if not shared.any():
        names = " and ".join(", ".join(sorted(table.namespaces - {BARE})) or "none" for table in (a, b))
        raise DataError(f"identity tables have no key in common (namespaces: {names}); check that they belong together")
    return IdentityTable(_sorted(a.column.filter(pa.array(shared))))


def namespaced_key(namespace: str, key: str) -> str:
    """Return `namespace:key`.

    Raises:
        DataError: the namespace holds what would make it ambiguous.
    """
    if not re.fullmatch(NAMESPACE, namespace):
        raise DataError(
            f"namespace {namespace!r} is malformed; use letters, digits, '_', '-' and '.', a letter or digit first"
        )
    return f"{namespace}:{key}"


def _check_joinable(a: IdentityTable, b: IdentityTable, keys: Keys | None) -> None:
    """Refuse to guess whether two data sets' keys agree."""
    assert keys in (None, "same", "distinct"), f"keys are 'same' or 'distinct', not {keys!r}"
    if keys is None and BARE in a.namespaces | b.namespaces:
        raise DataError(
            "identity tables of bare keys cannot be joined unsaid, for equal keys of two data sets may be two people; "
            "say keys='same' or keys='distinct', or give each data set's keys a namespace"
        )
    if keys == "distinct" and (shared := (a.namespaces & b.namespaces) - {BARE}):
        raise DataError(
            f"identity tables share namespace {min(shared)!r}, so their keys are not distinct; leave it unsaid"
        )


def _shared(a: IdentityTable, b: IdentityTable) -> npt.NDArray[np.bool_]:
    """(C_a,) which of a's keys are in b."""
    shared: npt.NDArray[np.bool_] = b.rows_of(a.column) != NO_ROW
    return shared


def _restored(column: pa.Array) -> IdentityTable:
    """A table from pickle, whose keys were checked when it was made."""
    table = IdentityTable.__new__(IdentityTable)
    table.column = column
    return table


def _as_column(keys: Iterable[str] | pa.Array) -> pa.Array:
    if isinstance(keys, pa.Array):
        return keys.cast(pa.large_string())
    keys = list(keys)
    try:
        return pa.array(keys, pa.large_string())
    except UnicodeEncodeError as error:
        raise DataError(f"identity key {error.object!r} is no valid text; rename what it comes from") from None


def _sorted(column: pa.Array) -> pa.Array:
    """The keys in the order of their UTF-8 bytes, which is Python's order of strings."""
    return column.take(pc.sort_indices(column))


def _repeated(column: pa.Array) -> str | None:
    """A key that stands twice; none in a sorted table costs one comparison a key."""
    if pc.all(pc.less(column[:-1], column[1:])).as_py():
        return None
    ordered = _sorted(column)
    place = pc.index(pc.equal(ordered[:-1], ordered[1:]), True).as_py()
    return None if place < 0 else str(ordered[place].as_py())


def _chunks(column: pa.Array) -> Iterator[list[str]]:
    for first in range(0, len(column), CHUNK):
        yield column[first : first + CHUNK].to_pylist()


def _hashes(column: pa.Array, prefix: str) -> npt.NDArray[np.uint64]:
    """(C,) the first 8 bytes of the sha256 of prefix and key."""
    start, hashes = prefix.encode(), np.empty(len(column), np.uint64)
    for number, keys in enumerate(_chunks(column)):
        raw = b"".join(hashlib.sha256(start + key.encode()).digest()[:8] for key in keys)
        hashes[number * CHUNK :][: len(keys)] = np.frombuffer(raw, ">u8")
    return hashes
