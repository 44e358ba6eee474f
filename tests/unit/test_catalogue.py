"""The catalogue against plain lists: written as NumPy would, mapped, passed over, chosen from."""

import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.benchmarks.startup import BALANCED, GLOBAL_BATCH, write_synthetic
from pipeline.data import catalogue as module
from pipeline.data.balanced import order_of
from pipeline.data.catalogue import FILE_NAME, RECORD, Catalogue, Records, Selection, save_catalogue
from pipeline.data.manifest import Manifest
from pipeline.data.order import OrderConfig, batch_positions
from pipeline.data.reading import ShardReader
from pipeline.errors import ConfigError, DataError
from pipeline.identities import NO_ROW

SIZES = [4, 1, 9, 3, 12, 2]
ROWS = 6
untimed = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(sizes: list[int], seed: int = 0) -> list[Records]:
    rng = np.random.default_rng(seed)
    shards = [np.empty(size, RECORD) for size in sizes]
    for shard in shards:
        shard["offset"] = rng.integers(1 << 40, size=len(shard))
        shard["size"] = rng.integers(1 << 32, size=len(shard), dtype=np.uint32)
        shard["row"] = rng.integers(ROWS, size=len(shard))
    return shards


def write(folder: Path, shards: list[Records]) -> Catalogue:
    save_catalogue(folder, iter(shards))
    return load(folder, [len(shard) for shard in shards])


def load(folder: Path, sizes: list[int]) -> Catalogue:
    return Catalogue.load(folder, np.array(sizes, np.int64))


def test_the_file_is_the_one_that_numpy_writes(tmp_path: Path) -> None:
    shards = records(SIZES)
    write(tmp_path, shards)
    np.save(tmp_path / "plain.npy", np.concatenate(shards))
    assert (tmp_path / FILE_NAME).read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, "plain.npy"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    shards = records(SIZES)
    write(tmp_path, shards)

    def broken() -> object:
        yield shards[0]
        raise ConnectionError("the worker died")

    with pytest.raises(ConnectionError):
        save_catalogue(tmp_path, broken())  # type: ignore[arg-type]
    assert np.array_equal(load(tmp_path, SIZES).records, np.concatenate(shards))


def test_each_shard_has_its_records(tmp_path: Path) -> None:
    shards = records(SIZES)
    catalogue = write(tmp_path, shards)
    assert all(np.array_equal(catalogue.shard(number), shard) for number, shard in enumerate(shards))
    assert isinstance(catalogue.records, np.memmap)


@pytest.mark.parametrize("window", [1, 5, 31, 1000])
def test_a_pass_sees_every_row_once_in_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    shards = records(SIZES)
    passed = list(write(tmp_path, shards).passes())
    assert passed[0][0] == 0
    assert passed[-1][1] == len(SIZES)
    assert all(one[1] == two[0] for one, two in pairwise(passed))
    for first, stop, rows in passed:
        assert rows.tolist() == np.concatenate(shards[first:stop])["row"].tolist()
        assert len(rows) < window + max(SIZES)


def test_a_pass_leaves_nothing_resident(tmp_path: Path) -> None:
    count = 3 << 20  # of 16 bytes, 48 MiB
    catalogue = write(tmp_path, [np.zeros(1 << 16, RECORD)] * (count >> 16))
    before = resident(tmp_path / FILE_NAME)
    assert catalogue.records["row"].sum() == 0
    assert resident(tmp_path / FILE_NAME) - before > 40 << 20, "a plain sum maps every page"
    assert sum(len(rows) for _, _, rows in catalogue.passes()) == count
    assert resident(tmp_path / FILE_NAME) < 1 << 20


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.endswith(str(path)))
    (rss,) = (line.split()[1] for line in lines[start : start + 5] if line.startswith("Rss:"))
    return int(rss) * 1024


@untimed
@given(st.integers(0, 1000), st.sets(st.integers(0, ROWS - 1)), st.sampled_from([1, 7, 1000]))
def test_a_selection_finds_the_samples_that_take_part(tmp_path: Path, seed: int, chosen: set[int], window: int) -> None:
    shards = records(SIZES, seed)
    taking = [shard[np.isin(shard["row"], list(chosen))] for shard in shards]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        selection = Selection(write(tmp_path, shards), np.isin(np.arange(ROWS), list(chosen)))
        assert selection.sizes().tolist() == [len(shard) for shard in taking]
        assert np.concatenate(list(selection.rows())).tolist() == np.concatenate(taking)["row"].tolist()
    places = [(shard, place) for shard, part in enumerate(taking) for place in range(len(part))]
    order = np.random.default_rng(seed).permutation(len(places))
    asked = np.array(places, np.int64).reshape(-1, 2)[order]
    expected = np.concatenate(taking)[order]
    assert np.array_equal(selection.records_at(asked[:, 0], asked[:, 1]), expected)


@pytest.mark.parametrize("row", [ROWS, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("everyone", [True, False])
def test_a_row_beyond_the_identity_table_is_named(tmp_path: Path, row: int, everyone: bool) -> None:
    shards = records(SIZES)
    shards[2]["row"][3] = row
    catalogue = write(tmp_path, shards)
    takes_part = np.full(ROWS, True)
    takes_part[1] = everyone
    selection = Selection(catalogue, takes_part)
    message = rf"{re.escape(str(tmp_path / FILE_NAME))} gives sample 8 row {row}, but the identity table has 6 rows"
    with pytest.raises(DataError, match=message):
        list(selection.rows())
    with pytest.raises(DataError, match=message):
        selection.records_at(np.array([1, 2]), np.array([0, 3]))
    if not everyone:
        with pytest.raises(DataError, match=message):
            selection.sizes()


def test_a_catalogue_that_is_not_of_the_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"catalogue\.npy is missing; restore it"):
        load(tmp_path, SIZES)
    write(tmp_path, records(SIZES))
    with pytest.raises(DataError, match="does not list the manifest's 32 samples"):
        load(tmp_path, [*SIZES, 1])
    content = (tmp_path / FILE_NAME).read_bytes()
    for broken in (content[:-1], content[:50], b"", b"no catalogue"):
        (tmp_path / FILE_NAME).write_bytes(broken)
        with pytest.raises(DataError, match=r"catalogue\.npy cannot be read: .*; restore it, or pack again"):
            load(tmp_path, SIZES)
    np.save(tmp_path / FILE_NAME, np.zeros(31, np.int64))
    with pytest.raises(DataError, match="does not list the manifest's 31 samples"):
        load(tmp_path, SIZES)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_start_holds_next_to_nothing_a_sample(tmp_path: Path, share: float, balanced: bool) -> None:
    """As `pipeline.benchmarks.startup` measures it, but for seconds: 200 shards of 20,000 samples."""
    samples, config = 4_000_000, OrderConfig(balanced=BALANCED if balanced else None)
    write_synthetic(tmp_path, samples, 200, 50_000)
    manifest = Manifest.load(tmp_path)
    labels = np.arange(manifest.identities_count)
    labels[int(share * len(labels)) :] = NO_ROW
    tracemalloc.start()
    try:
        reader = ShardReader(tmp_path, manifest, labels, config.open_shards)
        order = order_of(reader.selection, config, manifest.digest, 0, GLOBAL_BATCH)
        drawn = reader.selection.records_at(*order.samples_at(batch_positions(0, GLOBAL_BATCH)))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(drawn) == GLOBAL_BATCH
    window = 10 * module.WINDOW  # rows of a window, and which of them take part
    if balanced:
        assert held < 5 * samples
        assert peak < 12 * samples * share + 3 * window
    else:
        assert held < 2 * samples, "the orders of some blocks"
        assert peak < 3 * window


def test_a_balanced_start_with_another_global_batch_is_refused(tmp_path: Path) -> None:
    config = OrderConfig.model_validate({"balanced": {"identities": 3, "images": 2}})
    selection = Selection(write(tmp_path, records(SIZES)), np.full(ROWS, True))
    assert order_of(selection, config, "data", 0, 6).samples == 12
    with pytest.raises(ConfigError, match=r"global_batch is 8, but .* 3 identities x 2 images = 6; make them agree"):
        order_of(selection, config, "data", 0, 8)
