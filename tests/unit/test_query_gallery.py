"""A list of queries and gallery images, as CSV and as Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources import folder_key
from pipeline.data.sources_eval import QueryGalleryConfig, QueryGallerySource
from pipeline.errors import DataError
from tests.unit.eval_sets import encode, put, samples_of

ROWS = [
    {"path": "a/1.jpg", "identity": "007", "role": "gallery", "group": "shop", "price": "1.50"},
    {"path": "a/2, blue.jpg", "identity": "007", "role": "query", "group": "street", "price": ""},
    {"path": "é.jpg", "identity": "8", "role": "gallery", "group": "", "price": "NA"},
    {"path": "é.jpg", "identity": "8", "role": "query", "group": "", "price": "3"},
]
Rows = list[dict[str, str]]


def write(folder: Path, rows: Rows, kind: str = "csv") -> Path:
    path = folder / f"shop.{kind}"
    for number, row in enumerate(ROWS):
        put(folder / row["path"], encode(min(number, 2)))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return path


def source(path: Path, not_compared: Literal["group", "identity and group"] = "group") -> QueryGallerySource:
    return QueryGallerySource(QueryGalleryConfig(path=path, not_compared=not_compared, parts=3))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_images_roles_and_further_columns_are_read(tmp_path: Path, kind: str) -> None:
    listed = source(write(tmp_path, ROWS, kind))
    assert listed.name == "shop"
    samples = list(samples_of(listed, tmp_path).values())
    assert [sample.image for sample in samples] == [encode(number) for number in (0, 1, 2, 2)]
    assert [sample.identity for sample in samples] == ["007", "007", "8", "8"]
    assert [sample.attributes for sample in samples] == [
        {"file": "a/1.jpg", "role": "gallery", "group": "shop", "price": "1.50"},
        {"file": "a/2, blue.jpg", "role": "query", "group": "street", "price": ""},
        {"file": "é.jpg", "role": "gallery", "group": folder_key("é.jpg"), "price": "NA"},
        {"file": "é.jpg", "role": "query", "group": folder_key("é.jpg"), "price": "3"},
    ]
    roles = listed.protocol().roles
    assert roles is not None
    assert roles.to_pylist() == [
        {"key": s.key, "role": s.attributes["role"], "identity": s.identity, "group": s.attributes["group"]}
        for s in samples
    ]


def test_a_group_can_count_within_an_identity_only(tmp_path: Path) -> None:
    roles = source(write(tmp_path, ROWS), "identity and group").protocol().roles
    assert roles is not None
    assert roles["group"].to_pylist() == ['["007", "shop"]', '["007", "street"]', *[folder_key("é.jpg")] * 2]
    groups = source(tmp_path / "shop.csv", "identity and group").fingerprint()
    assert groups != source(tmp_path / "shop.csv").fingerprint()


def test_without_groups_an_image_is_compared_with_all_but_itself(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("path", "identity", "role")} for row in ROWS]
    roles = source(write(tmp_path, rows)).protocol().roles
    assert roles is not None
    assert roles["group"].to_pylist() == [folder_key(row["path"]) for row in rows]


def test_parquet_identities_may_be_numbers_and_paths_absolute(tmp_path: Path) -> None:
    write(tmp_path / "images", ROWS)
    rows = [{"path": str(tmp_path / "images" / row["path"]), "identity": 7, "role": row["role"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    samples = samples_of(source(tmp_path / "list.parquet"), tmp_path)
    assert {sample.identity for sample in samples.values()} == {"7"}


def changed(place: int, **cells: str) -> Rows:
    return [{**row, **cells} if number == place else row for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(1, identity=""), r"row {row} \('a/2, blue\.jpg'\) has no identity"),
        (changed(1, path=""), r"row {row} \(''\) has no path"),
        (changed(1, role="probe"), r"row {row} .* has a role that is neither 'query' nor 'gallery'"),
        (changed(1, role=""), r"row {row} .* has no role"),
        (
            [ROWS[0], ROWS[0], ROWS[1]],
            r"row {row} \('a/1\.jpg'\) names a path that an earlier row has in the same role",
        ),
        (changed(1, path="none.jpg"), r"row {row} \('none\.jpg'\) names an image that is not there, as do 0 more"),
        (ROWS[1:2], "has no row of role 'gallery'"),
        (ROWS[:1], "has no row of role 'query'"),
        ([{"path": "x", "role": "query"}], "has no column 'identity', but path, role"),
    ],
)
def test_bad_lists_are_told_with_their_row(tmp_path: Path, rows: Rows, message: str, kind: str) -> None:
    path = write(tmp_path, rows, kind)
    expected = message.format(row=2 if kind == "parquet" else 3)  # a CSV's header is its row 1
    with pytest.raises(DataError, match=rf"shop\.{kind}.*{expected}"):
        source(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'path', but none"),
        (b"path,identity,role\n", "has no row of role 'query'"),
        (b"path,identity,role\na/1.jpg,1,query\na/1.jpg,1\n", "row 3: Expected 3 columns, got 2"),
        (b"path,path,identity,role\n", "has two columns of one name"),
        (b"path,identity,role\n\xff,1,query\n", "cannot be read|is malformed"),
    ],
)
def test_files_that_are_no_csv_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, ROWS)
    put(tmp_path / "shop.csv", content)
    with pytest.raises(DataError, match=message) as caught:
        source(tmp_path / "shop.csv")
    assert "shop.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_of_a_spreadsheet_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    raw = write(tmp_path, ROWS).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    put(tmp_path / "shop.csv", b"\xef\xbb\xbf" + raw)
    assert len(samples_of(source(tmp_path / "shop.csv"), tmp_path)) == 4


def test_missing_and_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list .*none\.csv cannot be read"):
        source(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"list .*none\.parquet cannot be read"):
        source(tmp_path / "none.parquet")
    put(tmp_path / "bad.parquet", b"junk")
    with pytest.raises(DataError, match=r"list .*bad\.parquet cannot be read"):
        source(tmp_path / "bad.parquet")
    pq.write_table(pa.table({name: [[1]] for name in ("path", "identity", "role")}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"list .*bad\.parquet cannot be read"):
        source(tmp_path / "bad.parquet")
