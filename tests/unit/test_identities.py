"""Identity tables relate generations by key, never by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compat.parents import parent_part
from pipeline.errors import DataError
from pipeline.identities import NO_ROW, IdentityTable, align

tables = st.lists(st.text("abcde", min_size=1, max_size=3), min_size=1, max_size=20, unique=True).map(
    lambda keys: IdentityTable(tuple(keys))
)


def test_table_does_not_depend_on_the_order_of_arrival() -> None:
    assert IdentityTable.from_keys(["b", "a", "b", "c"]) == IdentityTable(("a", "b", "c"))
    assert IdentityTable(("a", "b")).digest != IdentityTable(("b", "a")).digest


def test_keys_twice_and_empty_tables_are_refused() -> None:
    with pytest.raises(DataError, match="'a' stands twice"):
        IdentityTable(("b", "a", "a"))
    with pytest.raises(DataError, match="empty"):
        IdentityTable(())


def test_smaller_subsets_lie_in_larger_ones() -> None:
    every = IdentityTable(tuple(f"k{number}" for number in range(100)))
    small, large = every.subset(10, seed=1), every.subset(40, seed=1)
    assert set(small.keys) < set(large.keys)
    assert list(large.keys) == [key for key in every.keys if key in set(large.keys)]
    assert small != every.subset(10, seed=2)
    with pytest.raises(DataError, match="101 identities asked for, but the data set has 100"):
        every.subset(101, seed=1)


def test_table_round_trips_and_broken_files_are_told(tmp_path: Path) -> None:
    table = IdentityTable(("U+4E00", "é", "a/b"))
    table.save(tmp_path / "t.parquet")
    assert IdentityTable.load(tmp_path / "t.parquet") == table
    with pytest.raises(DataError, match="is missing"):
        IdentityTable.load(tmp_path / "none.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        IdentityTable.load(tmp_path / "junk.parquet")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        IdentityTable.load(tmp_path / "other.parquet")


@given(tables, tables)
def test_alignment_is_by_key(old: IdentityTable, new: IdentityTable) -> None:
    alignment = align(old, new)
    for row, key in enumerate(old.keys):
        expected = new.keys.index(key) if key in new.keys else NO_ROW
        assert alignment.new_rows[row] == expected
    assert sorted([*alignment.kept, *alignment.gone]) == list(range(len(old)))
    assert (np.diff(alignment.new_rows[alignment.kept]) > 0).all()


@given(tables, tables, st.integers(1, 5))
def test_ranks_share_out_a_parent_by_the_new_rows(old: IdentityTable, new: IdentityTable, world_size: int) -> None:
    part = -(-len(new) // world_size)
    seen: list[int] = []
    for rank in range(world_size):
        old_rows, new_rows = parent_part(old, new, rank, world_size)
        assert (np.diff(new_rows) > 0).all(), "ascending, as a search needs it"
        for old_row, new_row in zip(old_rows, new_rows, strict=True):
            if new_row < len(new):
                assert old.keys[old_row] == new.keys[new_row]
                assert new_row // part == rank, "the old prototype lies where the new row lies"
            else:
                assert old.keys[old_row] not in new.keys
        seen += old_rows.tolist()
    assert sorted(seen) == list(range(len(old))), "every row of the parent is somewhere, once"
