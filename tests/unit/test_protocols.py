"""Protocols say what they mean, refuse what contradicts itself, and outlive the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.protocols import FILES, SCHEMAS, EvaluationSource, Protocol, load_protocol, save_protocol
from pipeline.data.sources import FolderSource, FolderSourceConfig
from pipeline.errors import DataError
from tests.unit.eval_sets import encode, put

GOOD: dict[str, list[tuple[Any, ...]]] = {
    "pairs": [("a", "b", True), ("a", "c", False)],
    "templates": [(1, 10, "a"), (1, 11, "b"), (2, 12, "c")],
    "template_pairs": [(1, 2, False)],
    "template_roles": [(1, "7", "gallery", "G1"), (2, "7", "query", "mixed")],
    "roles": [("a", "query", "7", "x"), ("d", "gallery", "7", "y")],
}


def table(name: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * len(SCHEMAS[name])
    return pa.table(columns, schema=SCHEMAS[name])


def protocol(**changes: list[tuple[Any, ...]] | None) -> Protocol:
    rows = {**GOOD, **changes}
    return Protocol(**{name: table(name, content) for name, content in rows.items() if content is not None})


@pytest.mark.parametrize(
    "chosen", [{"pairs"}, {"roles"}, {"templates", "template_pairs"}, {"templates", "template_roles"}, set(GOOD)]
)
def test_tables_come_back_as_they_were_saved_and_no_others(tmp_path: Path, chosen: set[str]) -> None:
    folder = tmp_path / "set"
    save_protocol(folder, protocol())
    assert {path.name for path in folder.iterdir()} == set(FILES)
    save_protocol(folder, protocol(**{name: None for name in GOOD if name not in chosen}))
    loaded = load_protocol(folder).tables
    assert set(loaded) == chosen
    for name in chosen:
        assert loaded[name].equals(table(name, GOOD[name]))
    assert {path.name for path in folder.iterdir()} == {f"{name}.parquet" for name in chosen}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys(GOOD), "protocol is empty"),
        ({"pairs": []}, "table pairs is empty"),
        ({"pairs": [("a", "b", True), ("c", None, True)]}, "table pairs: row 2 has no 'second'"),
        ({"pairs": [("a", "b", True), ("c", "c", True)]}, "table pairs: row 2 compares a sample with itself"),
        ({"template_pairs": [(1, 2, True), (3, 1, True)]}, "template_pairs: row 2 names a template .*: 3"),
        ({"template_pairs": [(1, 2, True), (1, 4, True)]}, "template_pairs: row 2 names a template .*: 4"),
        ({"template_roles": [(1, "7", "gallery", "G"), (5, "7", "query", "m")]}, "template_roles: row 2 names .*: 5"),
        ({"template_roles": [(1, "7", "probe", "G")]}, "template_roles: row 1 has a role .*: 'probe'"),
        ({"templates": None}, "has template_pairs but no templates"),
        ({"templates": None, "template_pairs": None}, "has template_roles but no templates"),
        ({"roles": [("a", "query", "7", "x")]}, "table roles has no gallery"),
        ({"roles": [("a", "gallery", "7", "x")]}, "table roles has no query"),
        ({"roles": [("a", "both", "7", "x")]}, "roles: row 1 has a role that is neither 'gallery' nor 'query': 'both'"),
        ({"roles": [*GOOD["roles"], ("a", "gallery", "7", "x")]}, "roles: sample 'a' stands twice"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        protocol(**changes)


def test_other_columns_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"table pairs has the columns first \(string\).*, not first \(string\), second"
    ):
        Protocol(pairs=pa.table({"first": ["a"]}))


def test_a_protocol_needs_all_of_its_samples() -> None:
    assert set(protocol().keys().to_pylist()) == {"a", "b", "c", "d"}
    protocol().require(iter("abcdef"))
    with pytest.raises(DataError, match=r"2 of the protocol's 4 samples are not in the data set, such as 'c'"):
        protocol().require("abe")
    with pytest.raises(DataError, match=r"2 of the protocol's 2 samples"):
        protocol(pairs=None, templates=None, template_pairs=None, template_roles=None).require([])


def test_broken_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data set {tmp_path} has no protocol \(pairs\.parquet, templates\.parquet"):
        load_protocol(tmp_path)
    save_protocol(tmp_path, protocol())
    whole = (tmp_path / "roles.parquet").read_bytes()
    put(tmp_path / "roles.parquet", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"roles\.parquet cannot be read") as caught:
        load_protocol(tmp_path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "roles.parquet")
    with pytest.raises(DataError, match=r"roles\.parquet has the columns key \(string\), not key \(string\), role"):
        load_protocol(tmp_path)
    put(tmp_path / "roles.parquet", whole)
    (tmp_path / "templates.parquet").unlink()
    with pytest.raises(DataError, match=rf"data set {tmp_path}: protocol has template_pairs but no templates"):
        load_protocol(tmp_path)


def test_a_source_without_a_protocol_is_none_of_evaluation(tmp_path: Path) -> None:
    put(tmp_path / "ann" / "1.jpg", encode(1))
    assert not isinstance(FolderSource(FolderSourceConfig(path=tmp_path)), EvaluationSource)
