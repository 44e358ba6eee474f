"""Identity tables relate generations by key, never by position."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compat.parents import parent_part
from pipeline.errors import DataError
from pipeline.identities import (
    BARE,
    NO_ROW,
    IdentityTable,
    align,
    align_across,
    intersection,
    namespaced_key,
    union,
)

untimed = settings(deadline=None)
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


@untimed
@given(tables, tables)
def test_alignment_is_by_key(old: IdentityTable, new: IdentityTable) -> None:
    alignment = align(old, new)
    for row, key in enumerate(old.keys):
        expected = new.keys.index(key) if key in new.keys else NO_ROW
        assert alignment.new_rows[row] == expected
    assert sorted([*alignment.kept, *alignment.gone]) == list(range(len(old)))
    assert (np.diff(alignment.new_rows[alignment.kept]) > 0).all()


@untimed
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


def spaced(keys: tuple[str, ...], namespace: str) -> IdentityTable:
    return IdentityTable(keys).in_namespace(namespace)


@untimed
@given(st.lists(st.text("ab\n\u00e9\U0001f600", max_size=4), min_size=1, max_size=20))
def test_a_table_is_its_keys(keys: list[str]) -> None:
    table = IdentityTable.from_keys(keys)
    assert table.keys == tuple(sorted(set(keys)))
    assert table.digest == hashlib.sha256("\n".join(table.keys).encode()).hexdigest()
    assert [table.row_of_key[key] for key in table.keys] == list(range(len(table)))
    assert pickle.loads(pickle.dumps(table)) == table


def test_a_pickled_table_is_its_column_alone() -> None:
    table = IdentityTable(tuple(f"person {number:05d}" for number in range(1000)))
    before = len(pickle.dumps(table))
    assert table.row_of_key
    assert len(pickle.dumps(table)) == before < 1000 * (12 + 8) + 1000


@untimed
@given(tables, st.lists(st.text("abcdef", max_size=3), max_size=30))
def test_rows_are_looked_up_by_key_however_often_it_is_asked_for(table: IdentityTable, keys: list[str]) -> None:
    expected = [table.keys.index(key) if key in table.keys else NO_ROW for key in keys]
    assert table.rows_of(keys).tolist() == expected


def test_tables_of_many_chunks_keep_their_digest_subset_and_split() -> None:
    keys = tuple(f"{number:06d}" for number in range(2 * 131072 + 7))
    table = IdentityTable(keys)
    assert table.digest == hashlib.sha256("\n".join(keys).encode()).hexdigest()
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"5:{key}".encode()).digest())
    assert set(table.subset(100, seed=5).keys) == set(ranked[:100])
    kept, held_out = table.hold_out(0.25, seed=5)
    assert sorted(kept.keys + held_out.keys) == list(keys)
    assert abs(len(held_out) / len(table) - 0.25) < 0.005


@untimed
@given(
    st.sets(st.text("abcdefgh", max_size=6), min_size=60, max_size=100),
    st.sets(st.text("ijkl", max_size=6), max_size=30),
    st.integers(0, 3),
)
def test_held_out_identities_stay_held_out_when_others_come(first: set[str], more: set[str], seed: int) -> None:
    kept, held_out = IdentityTable.from_keys(first).hold_out(0.5, seed)
    kept_later, held_out_later = IdentityTable.from_keys(first | more).hold_out(0.5, seed)
    assert set(kept.keys) | set(held_out.keys) == first
    assert not set(kept.keys) & set(held_out.keys)
    assert set(kept.keys) <= set(kept_later.keys)
    assert set(held_out.keys) <= set(held_out_later.keys)
    assert set(held_out.keys) <= set(IdentityTable.from_keys(first).hold_out(0.7, seed)[1].keys)


def test_a_split_with_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match=r"holding out 1e-09 of 2 identities leaves one part empty"):
        IdentityTable(("a", "b")).hold_out(1e-9, seed=0)


def test_a_table_knows_its_namespaces() -> None:
    table = IdentityTable(("ms1m:7", "glint:7", "7", ":7", "not one:7", "ms1m:a:b"))
    assert table.namespaces == {"ms1m", "glint", BARE}
    assert spaced(("7", "8"), "ms1m").keys == ("ms1m:7", "ms1m:8")
    with pytest.raises(DataError, match=r"namespace 'a' cannot be given to keys of namespace 'glint'"):
        table.in_namespace("a")
    for bad in ("", "a:b", "-a", "a b"):
        with pytest.raises(DataError, match="is malformed"):
            namespaced_key(bad, "7")


@pytest.mark.parametrize("join", [union, intersection, align_across])
def test_bare_keys_are_not_joined_unsaid(join: object) -> None:
    assert callable(join)
    bare, named = IdentityTable(("7", "8")), spaced(("7", "8"), "ms1m")
    for a, b in ((bare, bare), (bare, named), (named, bare)):
        with pytest.raises(DataError, match=r"say keys='same' or keys='distinct', or give .* a namespace"):
            join(a, b)


@untimed
@given(tables, tables)
def test_said_to_be_the_same_equal_keys_are_one_identity(a: IdentityTable, b: IdentityTable) -> None:
    assert union(a, b, keys="same") == union(b, a, keys="same") == IdentityTable.from_keys(a.keys + b.keys)
    assert (align_across(a, b, keys="same").new_rows == align(a, b).new_rows).all()
    common = set(a.keys) & set(b.keys)
    if common:
        assert intersection(a, b, keys="same") == intersection(b, a, keys="same") == IdentityTable.from_keys(common)
    else:
        with pytest.raises(DataError, match="no key in common"):
            intersection(a, b, keys="same")


@untimed
@given(tables, tables)
def test_said_to_be_distinct_equal_bare_keys_are_never_taken_for_one(a: IdentityTable, b: IdentityTable) -> None:
    assert len(align_across(a, b, keys="distinct").kept) == 0
    if set(a.keys) & set(b.keys):
        with pytest.raises(DataError, match="stands in both tables, whose keys are said to be distinct"):
            union(a, b, keys="distinct")
    else:
        assert set(union(a, b, keys="distinct").keys) == {*a.keys, *b.keys}


@untimed
@given(tables, tables, st.sampled_from([None, "same"]))
def test_namespaces_say_it_all(a: IdentityTable, b: IdentityTable, keys: Literal["same"] | None) -> None:
    faces, more, others = a.in_namespace("faces"), b.in_namespace("faces"), b.in_namespace("others")
    assert len(union(faces, others, keys)) == len(a) + len(b)
    assert union(faces, more, keys) == union(a, b, "same").in_namespace("faces")
    with pytest.raises(DataError, match=r"no key in common \(namespaces: faces and others\)"):
        intersection(faces, others, keys)
    with pytest.raises(DataError, match="share namespace 'faces', so their keys are not distinct"):
        union(faces, more, keys="distinct")


def test_broken_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for column, message in (
        (pa.array([1, 2]), "must hold a string in every row"),
        (pa.array(["a", None]), "must hold a string in every row"),
        (pa.array(["a", "a"]), r"t\.parquet: identity key 'a' stands twice"),
        (pa.array([], pa.string()), r"t\.parquet: identity table is empty"),
    ):
        pq.write_table(pa.table({"identity": column}), path)
        with pytest.raises(DataError, match=message):
            IdentityTable.load(path)
    pq.write_table(pa.table({"identity": pa.array(["a", "b"], pa.string())}), path)
    assert IdentityTable.load(path).keys == ("a", "b"), "as earlier versions wrote it"
    with pytest.raises(DataError, match="is no valid text"):
        IdentityTable(("\udcff",))
