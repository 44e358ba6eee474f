"""Shards against the tools that others read them with: DALI's wds2idx, the webdataset library and tarfile."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from wds2idx import IndexCreator  # type: ignore[import-untyped]
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.shards import ShardIndex, index_path, read_attributes, read_components, write_shard
from pipeline.data.sources import Sample
from pipeline.errors import DataError
from pipeline.identities import IdentityTable

TABLE = IdentityTable(("anna", "bjørn", "漢"))


def samples(prefix: str = "s") -> list[Sample]:
    """Sizes about the tar's block of 512 bytes, every extension, and identities out of order."""
    rng = np.random.default_rng(5)
    sizes = [1, 511, 512, 513, 10_240, 3]
    names = ["漢", "anna", "anna", "bjørn", "漢", "bjørn"]
    extensions = ["png", "jpg", "webp", "png", "jpg", "png"]
    return [
        Sample(f"{prefix}{number}-{'k' * number}", rng.bytes(size), extension, identity, {"pose": f"é{number}"})
        for number, (size, identity, extension) in enumerate(zip(sizes, names, extensions, strict=True))
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    tar = tmp_path / "shard-000000.tar"
    assert write_shard(tar, samples(), TABLE.row_of_key) == 6
    return tar


def load(tar: Path) -> ShardIndex:
    return ShardIndex.load(tar, index_path(tar), len(TABLE))


def test_the_index_is_the_one_that_wds2idx_writes(shard: Path, tmp_path: Path) -> None:
    assert shutil.which("tar"), "wds2idx needs GNU tar"
    with IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert index_path(shard).read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_webdataset_reads_the_samples_back(shard: Path) -> None:
    with shard.open("rb") as stream:  # its WebDataset class leaves the file open, which is an error here
        read = list(group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples()]
    for found, put in zip(read, samples(), strict=True):
        assert found[put.extension] == put.image
        assert int(found["cls"]) == TABLE.row_of_key[put.identity]
        assert json.loads(found["json"]) == {"identity": put.identity, **put.attributes}


def test_offsets_sizes_and_rows_are_those_of_tarfile(shard: Path) -> None:
    index = load(shard)
    with tarfile.open(shard) as archive:
        images = [member for member in archive if member.name.endswith(("png", "jpg", "webp"))]
    assert index.offsets.tolist() == [member.offset_data for member in images]
    assert index.sizes.tolist() == [member.size for member in images]
    assert index.rows.tolist() == [2, 0, 0, 1, 2, 1]
    assert [str(a.dtype) for a in (index.offsets, index.sizes, index.rows)] == ["int64", "int64", "int32"]
    assert len(index) == 6
    content = shard.read_bytes()
    spans = zip(index.offsets, index.sizes, strict=True)
    assert [content[offset : offset + size] for offset, size in spans] == [sample.image for sample in samples()]


def test_attributes_come_with_their_keys_in_order(shard: Path) -> None:
    expected = [(sample.key, {"identity": sample.identity, **sample.attributes}) for sample in samples()]
    assert read_attributes(shard, index_path(shard)) == expected


def test_the_same_samples_give_the_same_bytes_and_nothing_else_is_left(shard: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / shard.name
    again.parent.mkdir()
    write_shard(again, iter(samples()), TABLE.row_of_key)
    assert again.read_bytes() == shard.read_bytes()
    assert index_path(again).read_bytes() == index_path(shard).read_bytes()
    assert sorted(path.name for path in again.parent.iterdir()) == ["shard-000000.idx", "shard-000000.tar"]
    with tarfile.open(shard) as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(0, 0, "bct", 0o444)}


def test_a_write_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    stranger = Sample("z", b"x", "png", "nobody", {})
    with pytest.raises(KeyError):
        write_shard(tmp_path / "s.tar", [*samples(), stranger], TABLE.row_of_key)
    assert not (tmp_path / "s.tar").exists()
    assert not (tmp_path / "s.idx").exists()


def test_a_truncated_tar_is_told_with_the_first_key_that_is_cut(shard: Path) -> None:
    offset = int(load(shard).offsets[4])
    with shard.open("rb+") as stream:
        stream.truncate(offset + 5)
    with pytest.raises(DataError, match=rf"shard {shard} is cut off: its index puts s4-kkkk past its end"):
        load(shard)


def test_an_index_of_another_tar_of_the_same_layout_is_refused(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    write_shard(other, samples("t"), TABLE.row_of_key)
    with pytest.raises(DataError, match=r"index is not this shard's \(no t0-\.cls"):
        ShardIndex.load(shard, index_path(other), len(TABLE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed: line 1 is ''"),
        ("v1.1 1\ncls 512 1 a.cls", "malformed: line 1 is 'v1.1 1'"),
        ("v1.2 2\ncls 512 1 a.cls", "and 1 lines follow, not 'v1.2 1'"),
        ("v1.2 1\ncls 512 1", "malformed at line 2"),
        ("v1.2 2\ncls 512 1 a.cls\n", "and 1 lines follow"),
        ("v1.2 1\ncls 512 x a.cls", "malformed at line 2"),
        ("v1.2 1\ncls -512 1 a.cls", "malformed at line 2"),
        ("v1.2 1\ncls 0 1 a.cls", "malformed at line 2"),
        ("v1.2 1\n", "and 0 lines follow"),
        ("v1.2 1\ncls 512 1 s0-.cls", "s0- has 0 images"),
        ("v1.2 1\npng 2560 1 s0-.png", "s0- has no .cls"),
        ("v1.2 1\ncls 512 1 s0-.cls png 2560 1 s0-.png jpg 2560 1 s0-.jpg", "s0- has 2 images"),
        ("v1.2 1\ncls 1024 1 s0-.cls png 2560 1 s0-.png", "index is not this shard's"),
    ],
)
def test_a_malformed_index_is_refused(shard: Path, text: str, message: str) -> None:
    index_path(shard).write_text(text)
    with pytest.raises(DataError) as error:
        load(shard)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["tar", "idx"])
def test_a_missing_file_is_named(shard: Path, which: str) -> None:
    missing = shard.with_suffix(f".{which}")
    missing.unlink()
    with pytest.raises(DataError, match=f"{missing} is missing"):
        load(shard)


@pytest.mark.parametrize("label", [b"3", b"-", b"x", b" "])
def test_a_label_that_is_no_row_of_the_table_is_refused(shard: Path, label: bytes) -> None:
    _, components = list(read_components(shard, index_path(shard)))[2]
    member = next(component for component in components if component.extension == "cls")
    with shard.open("rb+") as stream:
        stream.seek(member.offset)
        stream.write(label)
        assert member.size == 1
    with pytest.raises(DataError, match=rf"shard {shard}: s2-kk\.cls is .* not a row below 3"):
        load(shard)


def test_attributes_that_are_no_json_object_are_refused(shard: Path) -> None:
    _, components = next(read_components(shard, index_path(shard)))
    member = next(component for component in components if component.extension == "json")
    with shard.open("rb+") as stream:
        stream.seek(member.offset)
        stream.write(b"[")
    with pytest.raises(DataError, match=r"s0-\.json is no JSON object"):
        read_attributes(shard, index_path(shard))


def test_webdataset_shards_made_by_others_are_read(tmp_path: Path) -> None:
    """Without .json, with names in folders that fill more than a header's field, indexed by wds2idx."""
    tar = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for number in range(3):
            key = f"{'folder' * 8}/{'name' * 14}{number}"
            writer.write({"__key__": key, "jpg": b"j" * 700, "cls": str(number).encode()})
    with IndexCreator(str(tar), str(index_path(tar)), verbose=False) as creator:
        creator.create_index()
    assert load(tar).rows.tolist() == [0, 1, 2]
    assert load(tar).sizes.tolist() == [700] * 3
