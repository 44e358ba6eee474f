"""The reader on real shards: the bytes and labels that were packed, the shards it asks for, and what it refuses."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.balanced import order_of
from pipeline.data.finishing import write_data_set
from pipeline.data.manifest import Manifest
from pipeline.data.order import Ints, Order, OrderConfig, batch_positions
from pipeline.data.reading import ShardReader
from pipeline.data.sources import Sample
from pipeline.data.store import LocalStore, ShardFiles
from pipeline.errors import DataError
from pipeline.identities import NO_ROW, IdentityTable

SIZES = [9, 4, 1, 12, 7, 3, 8, 5, 6, 10]
KEYS = tuple(f"id-{number}" for number in range(7))
EVERYONE = np.arange(len(KEYS))
SOME = np.array([NO_ROW, 2, NO_ROW, 0, NO_ROW, NO_ROW, 1])


@dataclass(frozen=True)
class DataSet:
    """A packed data set beside what went into it: content and row of each sample, shard after shard."""

    folder: Path
    manifest: Manifest
    content: list[list[bytes]]
    rows: list[list[int]]

    def reader(self, labels: Ints = EVERYONE, limit: int = 4, store: ShardFiles | None = None) -> ShardReader:
        return ShardReader(self.folder, self.manifest, labels, limit, store)

    def expected(self, labels: Ints) -> list[list[tuple[bytes, int]]]:
        """Content and label of the samples that take part, by shard."""
        return [
            [(content, int(labels[row])) for content, row in zip(*shard, strict=True) if labels[row] != NO_ROW]
            for shard in zip(self.content, self.rows, strict=True)
        ]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """Shards of random bytes of random length; the third has no sample of SOME; without indices."""
    rng = np.random.default_rng(0)
    content = [[rng.bytes(int(rng.integers(1, 2000))) for _ in range(size)] for size in SIZES]
    rows = [rng.integers(len(KEYS), size=size).tolist() for size in SIZES]
    rows[2] = [0]
    folder, table = tmp_path / "data", IdentityTable(KEYS)
    shards = (
        [
            Sample(f"s{number}-{n}", image, "png", KEYS[row])
            for n, (image, row) in enumerate(zip(images, of, strict=True))
        ]
        for number, (images, of) in enumerate(zip(content, rows, strict=True))
    )
    manifest = write_data_set(folder, "bytes", table, shards)
    for index in folder.glob("*.idx"):
        index.unlink()
    return DataSet(folder, manifest, content, rows)


def open_files(folder: Path) -> list[str]:
    """Names of the tars of a folder that this process has open."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [Path(link).name for link in links if link.startswith(str(folder)) and ".tar" in link]


@pytest.mark.parametrize("labels", [EVERYONE, EVERYONE[::-1].copy(), SOME])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_samples_are_read_with_their_labels_without_any_index(data: DataSet, labels: Ints, limit: int) -> None:
    expected = data.expected(labels)
    reader = data.reader(labels, limit)
    assert reader.selection.sizes().tolist() == [len(shard) for shard in expected]
    everywhere = [(shard, place) for shard, part in enumerate(expected) for place in range(len(part))]
    shuffled = np.random.default_rng(1).permutation(everywhere * 2)
    work = reader.read(5, shuffled[:, 0], shuffled[:, 1])
    assert work.step == 5
    assert list(zip(work.raws, work.labels_B.tolist(), strict=True)) == [expected[s][p] for s, p in shuffled.tolist()]
    assert work.labels_B.dtype == np.int64
    assert len(open_files(data.folder)) == min(limit, sum(map(bool, expected)))
    reader.close()
    assert open_files(data.folder) == []
    assert reader.read(6, shuffled[:1, 0], shuffled[:1, 1]).raws == work.raws[:1]
    reader.close()


@dataclass
class Fetched:
    """A cache before a folder far away: fetches by copying, and drops what is released at once."""

    far: Path
    near: Path
    log: list[tuple[str, str]] = field(default_factory=list)

    def local(self, name: str) -> Path:
        self.log.append(("local", name))
        if not (self.near / name).exists():
            shutil.copy(self.far / name, self.near / name)
        return self.near / name

    def prefetch(self, names: Sequence[str]) -> None:
        self.log += [("prefetch", name) for name in names]
        for name in names:
            self.local(name)
            self.log.pop()

    def release(self, name: str) -> None:
        self.log.append(("release", name))
        (self.near / name).unlink(missing_ok=True)


@pytest.fixture
def fetched(data: DataSet, tmp_path: Path) -> Fetched:
    (tmp_path / "near").mkdir()
    return Fetched(data.folder, tmp_path / "near")


def read_epochs(reader: ShardReader, order: Order, batch: int, epochs: int = 2) -> list[tuple[bytes, int]]:
    """Content and label of the samples of some epochs, read as the loader does."""
    read: list[tuple[bytes, int]] = []
    for step in range(-(-epochs * order.samples // batch)):
        positions = batch_positions(step, batch)
        reader.expect(order.shards_ahead(positions))
        work = reader.read(step, *order.samples_at(positions))
        read += zip(work.raws, work.labels_B.tolist(), strict=True)
    return read[: epochs * order.samples]


@pytest.mark.parametrize("labels", [EVERYONE, SOME])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_next_block_is_fetched_ahead_and_those_behind_let_go(
    data: DataSet, fetched: Fetched, labels: Ints, batch: int
) -> None:
    reader = data.reader(labels, 4, fetched)
    order = order_of(reader.selection, OrderConfig(block_shards=2), "data", 0, batch)
    read = read_epochs(reader, order, batch)
    once = sorted(pair for shard in data.expected(labels) for pair in shard)
    assert sorted(read[: order.samples]) == sorted(read[order.samples :]) == once

    near: set[str] = set()
    most = 0
    for event, name in fetched.log:
        if event == "prefetch":
            assert name not in near, "asked for once while it is there"
            near.add(name)
        elif event == "release":
            near.remove(name)
        else:
            assert name in near, "asked for before it is needed"
        most = max(most, len(near))
    # a batch of seven may lie in four blocks, as one of shards of 1 and 3 samples is small
    assert most <= (4 if batch == 1 else 8) < len(SIZES)
    first_two = [event for event, _ in fetched.log[:3]]
    assert first_two == ["prefetch"] * 3, "two blocks before the first sample"
    asked = {name for event, name in fetched.log if event == "prefetch"}
    sizes = reader.selection.sizes()
    assert asked == {entry.name for entry, size in zip(data.manifest.shards, sizes, strict=True) if size}
    reader.close()
    assert list(fetched.near.iterdir()) == []
    assert open_files(fetched.near) == []


def test_a_balanced_order_reads_through_the_same_reader(data: DataSet, fetched: Fetched) -> None:
    config = OrderConfig.model_validate({"balanced": {"identities": 3, "images": 2}})
    reader = data.reader(SOME, 4, fetched)
    order = order_of(reader.selection, config, "data", 0, 6)
    read = read_epochs(reader, order, 6, epochs=30)
    once = {pair for shard in data.expected(SOME) for pair in shard}
    assert set(read) == once
    for first in range(0, len(read), 6):
        labels = [label for _, label in read[first : first + 6]]
        assert sorted(labels) == [0, 0, 1, 1, 2, 2]
        assert all(labels[place] == labels[place + 1] for place in (0, 2, 4))
        assert len({content for content, _ in read[first : first + 6]}) == 6
    reader.close()
    assert list(fetched.near.iterdir()) == []


def test_a_reader_that_is_told_nothing_lets_go_of_the_shard_used_longest_ago(data: DataSet, fetched: Fetched) -> None:
    reader = data.reader(limit=2, store=fetched)
    for shard in (0, 1, 0, 3, 4):
        reader.read(0, np.array([shard]), np.array([0]))
    assert [int(name[6:12]) for event, name in fetched.log if event == "release"] == [1, 0]
    assert sorted(int(name[6:12]) for name in open_files(fetched.near)) == [3, 4]
    reader.close()


def test_a_shard_that_is_needed_soon_is_not_let_go(data: DataSet, fetched: Fetched) -> None:
    reader = data.reader(limit=1, store=fetched)
    reader.expect(np.array([0, 1, 3, 0]))
    for shard in (0, 1, 0, 3):
        reader.read(0, np.array([shard]), np.array([0]))
    assert all(event != "release" for event, _ in fetched.log)
    reader.expect(np.array([3, 4]))
    assert sorted(event for event in fetched.log if event[0] == "release") == [
        ("release", "shard-000000.tar"),
        ("release", "shard-000001.tar"),
    ]
    assert fetched.log[:3] == [("prefetch", f"shard-00000{shard}.tar") for shard in (0, 1, 3)]
    reader.close()


def test_the_default_files_are_the_folders(data: DataSet) -> None:
    files = LocalStore(data.folder)
    files.prefetch(["shard-000001.tar"])
    files.release("shard-000001.tar")
    assert files.local("shard-000001.tar") == data.folder / "shard-000001.tar"
    assert len(list(data.folder.glob("*.tar"))) == len(SIZES)


def read_one(reader: ShardReader, shard: int, place: int) -> bytes:
    return reader.read(0, np.array([shard]), np.array([place])).raws[0]


def test_a_missing_shard_is_named(data: DataSet) -> None:
    (data.folder / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*shard-000003\.tar is missing; restore it"):
        read_one(data.reader(), 3, 0)


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_is_refused_each_time(data: DataSet, change: int) -> None:
    path = data.folder / "shard-000003.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    reader = data.reader()
    for _ in range(2):
        with pytest.raises(DataError, match=rf"shard-000003\.tar has {size + change} bytes, not {size}: it changed"):
            read_one(reader, 3, 0)
    assert open_files(data.folder) == []


def test_a_shard_that_shrinks_while_it_is_open_is_named(data: DataSet) -> None:
    reader = data.reader()
    assert read_one(reader, 3, 0) == data.content[3][0]
    os.truncate(data.folder / "shard-000003.tar", 600)
    with pytest.raises(DataError, match=r"shard-000003\.tar ends before its catalogue says; pack or fetch it again"):
        read_one(reader, 3, 5)
    reader.close()


def test_a_catalogue_of_another_data_set_is_refused(data: DataSet) -> None:
    records = np.load(data.folder / "catalogue.npy")
    np.save(data.folder / "catalogue.npy", records[1:])
    with pytest.raises(DataError, match=re.escape("does not list the manifest's 65 samples; pack again")):
        data.reader()


def test_samples_that_are_refused_are_named_by_their_keys(data: DataSet) -> None:
    reader = data.reader(SOME)
    sizes = reader.selection.sizes()
    starts = np.cumsum([0, *sizes])
    places = np.arange(starts[-1])
    shards = np.searchsorted(starts, places, side="right") - 1
    work = reader.read(0, shards, places - starts[shards])
    short = [raw for raw in work.raws if len(raw) < 500]
    bad = reader.bad_samples(work, lambda raw: "short" if len(raw) < 500 else None)
    assert 0 < len(short) < len(work.raws)
    by_key = {
        f"s{shard}-{place}.png": content
        for shard, images in enumerate(data.content)
        for place, content in enumerate(images)
    }
    assert [by_key[sample.key] for sample in bad] == short
    assert all(sample.shard == f"shard-{int(sample.key[1]):06d}.tar" for sample in bad)
    assert {sample.reason for sample in bad} == {"short"}
    assert all(one != two for one, two in pairwise(bad))
    reader.close()
