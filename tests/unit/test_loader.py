"""The loader against NumPy and Pillow: which samples, in which order, with which pixels."""

import gc
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.data.catalogue import Records
from pipeline.data.decoding import THREADS
from pipeline.data.finishing import describe, describe_shard
from pipeline.data.giving_way import STARVED, threads_named
from pipeline.data.loader import Batch, TrainingLoader, iterate_images
from pipeline.data.manifest import Manifest, ShardEntry
from pipeline.data.order import BalancedConfig, OrderConfig, SampleOrder
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig, draw_parameters, noise_bank
from pipeline.data.reading import UndecodableError
from pipeline.data.shards import write_shard
from pipeline.data.sources import Sample
from pipeline.errors import ConfigError, DataError
from pipeline.identities import IdentityTable

Floats = npt.NDArray[np.float64]
FULL: dict[str, Any] = {"rotate": 15.0, "scale": 0.15, "shift": 3.0, "flip": True, "blur": 1.2, "noise": 40.0}
ALL = FULL | {"crop": 0.6, "crop_ratio": 1.3, "brightness": 0.3, "contrast": 0.3, "compress": 0.5}
WHOLE = PreprocessConfig(size=32, resize=40)
SHARD_SIZES = [13, 7, 1, 20, 10]
KEYS = [f"id-{number}" for number in range(9)]


@dataclass(frozen=True)
class DataSet:
    """A packed data set beside the pixels and identities that went into it, in the shards' order."""

    folder: Path
    manifest: Manifest
    pixels: list[npt.NDArray[np.uint8]]
    identities: list[str]

    def loader(
        self, keys: list[str] | None = None, preprocess: PreprocessConfig = WHOLE, **kwargs: Any
    ) -> TrainingLoader:
        augment = AugmentConfig(**kwargs.pop("augment", {}))
        table = IdentityTable(tuple(keys or KEYS))
        options: dict[str, Any] = {"seed": 3, "global_batch": 7, "order": OrderConfig(block_shards=2)} | kwargs
        return TrainingLoader(self.folder, self.manifest, table, preprocess, augment, **options)

    def sample_numbers(self, positions: range, seed: int = 3) -> list[int]:
        """Place in the shards' order of the samples at `positions` of a run on all identities."""
        order = SampleOrder(np.array(SHARD_SIZES), self.manifest.digest, seed, 2)
        shards, places = order.samples_at(np.array(positions))
        return (np.cumsum([0, *SHARD_SIZES])[shards] + places).tolist()  # type: ignore[no-any-return]


def encode(pixels: npt.NDArray[np.uint8], kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return buffer.getvalue()


def random_image(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, shape, np.uint8)


def take(loader: TrainingLoader, count: int) -> list[Batch]:
    iterator = iter(loader)
    batches = list(islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return batches


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        one.step == two.step
        and torch.equal(one.labels_B, two.labels_B)
        and torch.equal(one.images_BCHW, two.images_BCHW)
        for one, two in zip(left, right, strict=True)
    )


def in_pixel_values(batch: Batch, preprocess: PreprocessConfig = WHOLE) -> Floats:
    return batch.images_BCHW.double().numpy() * preprocess.std + preprocess.mean


def pack(folder: Path, pixels: list[npt.NDArray[np.uint8]], files: list[bytes]) -> DataSet:
    """Write images as they are, broken ones too, into shards of SHARD_SIZES; identities take turns."""
    folder.mkdir(exist_ok=True)
    identities = [KEYS[5 * number % len(KEYS)] for number in range(len(files))]
    table = IdentityTable(tuple(KEYS))
    shards: list[tuple[ShardEntry, Records]] = []
    for start, stop in pairwise(np.cumsum([0, *SHARD_SIZES]).tolist()):
        tar = folder / f"shard-{len(shards):05d}.tar"
        write_shard(
            tar, (Sample(f"s{n:04d}", files[n], "png", identities[n]) for n in range(start, stop)), table.row_of_key
        )
        shards.append(describe_shard(tar))
    describe(folder, "made by hand", table, shards, source="0" * 64, pack={}, rejects={}).save()
    return DataSet(folder, Manifest.load(folder), pixels, identities)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    rng = np.random.default_rng(0)
    pixels = [random_image(rng, 40, 40) for _ in range(sum(SHARD_SIZES))]
    return pack(tmp_path_factory.mktemp("grey"), pixels, [encode(image) for image in pixels])


@pytest.mark.parametrize("size", [32, 31, 40])
def test_each_step_gives_its_own_samples_cut_out_exactly(grey: DataSet, size: int) -> None:
    """Twelve steps run past the prefetching and over the end of an epoch (51 samples)."""
    preprocess = PreprocessConfig(size=size, resize=40)
    margin = (40 - size) // 2
    for step, batch in enumerate(take(grey.loader(preprocess=preprocess), 12)):
        numbers = grey.sample_numbers(range(step * 7, step * 7 + 7))
        crops = np.stack([grey.pixels[number][margin : margin + size, margin : margin + size] for number in numbers])
        assert batch.step == step
        assert batch.images_BCHW.shape == (7, 1, size, size)
        assert batch.images_BCHW.dtype == torch.float32
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels_B.dtype == torch.int64
        assert batch.labels_B.tolist() == [KEYS.index(grey.identities[number]) for number in numbers]
        assert np.abs(batch.images_BCHW[:, 0].numpy() - (crops.astype(np.float32) - 127.5) / 127.5).max() < 1e-6


@pytest.mark.parametrize("augment", [{"rotate": 1e-9}, {"shift": 1e-9}, {"blur": 1e-9}, {"rotate": 1e-9, "blur": 1e-9}])
def test_augmentation_of_no_size_changes_no_pixel(grey: DataSet, augment: dict[str, float]) -> None:
    assert same(take(grey.loader(augment=augment), 9), take(grey.loader(), 9))


def warp_reference(image: Floats, matrix_23: Floats, size: int) -> Floats:
    """Bilinear sampling at the pixels' centres, border pixels going on outside."""
    y, x = np.mgrid[:size, :size] + 0.5
    source_x, source_y = np.einsum("ij,jyx->iyx", matrix_23, np.stack([x, y, np.ones_like(x)])) - 0.5
    x0, y0 = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    out = np.zeros((size, size))
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - np.abs(source_x - x0 - dx)) * (1 - np.abs(source_y - y0 - dy))
            out += weight * image[np.clip(y0 + dy, 0, 39), np.clip(x0 + dx, 0, 39)]
    return out


def blur_reference(image: Floats, sigma: float) -> Floats:
    """Separable Gaussian of radius ceil(3 sigma), mirrored about the border pixel."""
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(image, radius, mode="reflect")
    rows = np.apply_along_axis(np.convolve, 1, padded, kernel / kernel.sum(), "valid")
    return np.apply_along_axis(np.convolve, 0, rows, kernel / kernel.sum(), "valid")


@pytest.mark.parametrize(
    "off", [("blur", "noise"), ("rotate", "scale", "shift", "flip", "noise"), ("noise",), ("blur",), ()]
)
def test_augmentation_agrees_with_numpy(grey: DataSet, off: tuple[str, ...]) -> None:
    augment = {name: value for name, value in FULL.items() if name not in off}
    config, bank = AugmentConfig(**augment), noise_bank(3, 32 * 32)
    for batch in take(grey.loader(augment=augment), 9):
        positions = range(batch.step * 7, batch.step * 7 + 7)
        draws = draw_parameters(config, WHOLE, 3, np.array(positions))
        for row, number in enumerate(grey.sample_numbers(positions)):
            image = warp_reference(grey.pixels[number].astype(np.float64), draws.matrices_B23[row].astype(float), 32)
            if config.blur:
                image = blur_reference(image, float(draws.blur_B[row]))
            if config.noise:
                start = draws.noise_starts_B[row]
                image += draws.noise_B[row] * bank[start : start + 32 * 32].reshape(32, 32)
                image = image.clip(0, 255)
            assert np.abs(in_pixel_values(batch)[row, 0] - image).max() < 0.05


@pytest.fixture(scope="module")
def unbroken(grey: DataSet) -> list[Batch]:
    return take(grey.loader(augment=ALL, global_batch=13), 12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 13])
def test_ranks_together_see_the_same_pixels(grey: DataSet, unbroken: list[Batch], world_size: int) -> None:
    options: dict[str, Any] = {"augment": ALL, "global_batch": 13, "world_size": world_size}
    ranks = [take(grey.loader(rank=rank, **options), 6) for rank in range(world_size)]
    joined = [
        Batch(
            torch.cat([b.images_BCHW for b in parts]), torch.cat([b.labels_B for b in parts]), parts[0].step, list[str]
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, unbroken[:6])


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_resumed_run_sees_the_same_pixels(grey: DataSet, unbroken: list[Batch], start: int) -> None:
    resumed = grey.loader(augment=ALL, global_batch=13, start_step=start)
    assert resumed.state["step"] == start
    assert same(take(resumed, 3), unbroken[start : start + 3])


def test_threads_change_no_pixel(grey: DataSet, unbroken: list[Batch]) -> None:
    assert same(take(grey.loader(augment=ALL, global_batch=13, threads=3), 6), unbroken[:6])


def test_another_seed_gives_other_batches(grey: DataSet, unbroken: list[Batch]) -> None:
    other = take(grey.loader(augment=ALL, global_batch=13, seed=4), 1)[0]
    assert not torch.equal(other.labels_B, unbroken[0].labels_B)


def test_iterating_again_goes_on_and_the_state_says_where(grey: DataSet, unbroken: list[Batch]) -> None:
    loader = grey.loader(augment=ALL, global_batch=13)
    table = IdentityTable(tuple(KEYS))
    assert loader.state == {
        "step": 0,
        "manifest": grey.manifest.digest,
        "identities": table.digest,
        "global_batch": 13,
        "seed": 3,
        "order": "mixed in blocks of 2 shards",
    }
    assert same(take(loader, 2), unbroken[:2])
    assert loader.state["step"] == 2
    assert same(take(loader, 3), unbroken[2:5])
    assert loader.state["step"] == 5


def test_handed_out_batches_are_not_overwritten(grey: DataSet) -> None:
    kept, copies = [], []
    for batch in islice(grey.loader(augment=FULL), 8):
        kept.append(batch.images_BCHW)
        copies.append(batch.images_BCHW.clone())
    assert all(torch.equal(one, two) for one, two in zip(kept, copies, strict=True))


def policies(threads: set[int]) -> set[int]:
    return {os.sched_getscheduler(thread) for thread in threads}


def test_decoding_gives_way_until_others_take_every_processor(grey: DataSet) -> None:
    undisturbed = take(grey.loader(global_batch=51), 4 * STARVED)
    gc.collect()  # decoders of other tests
    before = threads_named(THREADS)
    batches = iter(grey.loader(global_batch=51))
    disturbed = [next(batches)]
    first = threads_named(THREADS) - before
    assert policies(first) == {os.SCHED_IDLE}
    everywhere, one = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {one})
    busy = subprocess.Popen(["taskset", "-c", str(one), sys.executable, "-c", "while True: pass"])
    try:
        disturbed += islice(batches, 4 * STARVED - 1)
        assert policies(threads_named(THREADS) - before - first) == {os.SCHED_OTHER}
    finally:
        busy.kill()
        busy.wait()
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), everywhere)
    assert same(disturbed, undisturbed)


def test_a_run_on_some_identities_labels_by_its_own_table(grey: DataSet) -> None:
    keys = ["id-7", "id-2", "id-4"]
    chosen = [number for number, key in enumerate(grey.identities) if key in keys]
    loader = grey.loader(keys=keys, global_batch=len(chosen))
    assert loader.samples == len(chosen)
    (first, second) = take(loader, 2)
    for epoch in (first, second):
        seen = set()
        for pixels, label in zip(in_pixel_values(epoch), epoch.labels_B.tolist(), strict=True):
            crop = pixels[0].round().astype(np.uint8)
            (number,) = (n for n in chosen if np.array_equal(grey.pixels[n][4:36, 4:36], crop))
            assert grey.identities[number] == keys[label]
            seen.add(number)
        assert seen == set(chosen)
    assert not torch.equal(first.labels_B, second.labels_B)


def test_a_reordered_table_changes_labels_alone(grey: DataSet) -> None:
    straight, turned = take(grey.loader(), 4), take(grey.loader(keys=KEYS[::-1]), 4)
    for one, two in zip(straight, turned, strict=True):
        assert torch.equal(one.images_BCHW, two.images_BCHW)
        assert torch.equal(one.labels_B, len(KEYS) - 1 - two.labels_B)


def test_missing_identities_are_counted_and_one_is_named(grey: DataSet) -> None:
    with pytest.raises(DataError, match=r"2 identities of the run are not in the data set, such as 'id-99'"):
        grey.loader(keys=["id-1", "id-99", "id-98"])


def test_more_ranks_than_samples_in_a_batch_are_refused(grey: DataSet) -> None:
    with pytest.raises(ConfigError, match="3 samples is shared by 4 ranks"):
        grey.loader(global_batch=3, world_size=4)


@pytest.mark.parametrize("batch_size", [1, 20, 51, 200])
def test_evaluation_sees_every_image_once_in_order(grey: DataSet, batch_size: int) -> None:
    batches = list(iterate_images(grey.folder, grey.manifest, WHOLE, batch_size))
    assert [first for _, first in batches] == list(range(0, 51, batch_size))
    assert [len(images) for images, _ in batches] == [min(batch_size, 51 - first) for _, first in batches]
    expected = np.stack(grey.pixels)[:, None, 4:36, 4:36].astype(np.float32)
    images = torch.cat([images for images, _ in batches])
    assert np.abs(images.numpy() - (expected - 127.5) / 127.5).max() < 1e-6


def test_colour_images_keep_their_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = [random_image(rng, 20, 20, 3) for _ in range(sum(SHARD_SIZES))]
    data = pack(tmp_path, pixels, [encode(image) for image in pixels])
    preprocess = PreprocessConfig(size=16, resize=20, channels=3, mean=100.0, std=50.0)
    for batch in take(data.loader(preprocess=preprocess), 3):
        numbers = data.sample_numbers(range(batch.step * 7, batch.step * 7 + 7))
        expected = np.stack([pixels[number][2:18, 2:18] for number in numbers]).transpose(0, 3, 1, 2)
        assert np.abs(in_pixel_values(batch, preprocess) - expected).max() < 1e-4
    noisy = take(data.loader(preprocess=preprocess, augment=FULL), 1)[0]
    assert noisy.images_BCHW.shape == (7, 3, 16, 16)
    assert noisy.images_BCHW.is_contiguous(memory_format=torch.channels_last)


def smooth(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A picture without detail, the same at any resolution."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    picture: Floats = 127 + 60 * np.sin(3 * x) + 60 * np.cos(2 * y)
    return picture.round().astype(np.uint8)


def test_images_of_any_size_and_kind_are_brought_to_one_size(tmp_path: Path) -> None:
    """The picture of the right size is left alone; the others, in the same batch, come out all but equal to it."""
    sizes = [(40, 40), (80, 80), (27, 61), (200, 40), (40, 41)]
    pixels, files = [], []
    for number in range(sum(SHARD_SIZES)):
        pixels.append(smooth(*sizes[number % len(sizes)]))
        files.append(encode(pixels[-1], "jpeg" if number % 3 == 1 else "png"))
    data = pack(tmp_path, pixels, files)
    images = torch.cat([images for images, _ in iterate_images(data.folder, data.manifest, WHOLE, 10)])
    values = images[:, 0].double().numpy() * 127.5 + 127.5
    expected = smooth(40, 40)[4:36, 4:36]
    assert np.abs(values[0] - expected).max() < 1e-3
    assert np.abs(values - expected).max() < 4


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_kinds_of_pixels_become_what_pillow_makes_of_them(
    tmp_path: Path, mode: str, channels: Literal[1, 3]
) -> None:
    rng = np.random.default_rng(2)
    image = Image.fromarray(random_image(rng, 40, 40, 3)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float64)[4:36, 4:36]
    data = pack(tmp_path, [random_image(rng, 40, 40)] * 51, [buffer.getvalue()] * 51)
    preprocess = WHOLE.model_copy(update={"channels": channels})
    images, _ = next(iterate_images(data.folder, data.manifest, preprocess, 2))
    values = (images[0].double().numpy() * 127.5 + 127.5).transpose(1, 2, 0)
    assert np.abs(values - expected.reshape(32, 32, channels)).max() < 2


@pytest.mark.parametrize("bad_step", [0, 1, 5])
@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_a_sample_that_does_not_decode_is_named(grey: DataSet, tmp_path: Path, bad_step: int, damage: str) -> None:
    files = [encode(image) for image in grey.pixels]
    clean = pack(tmp_path / "clean", grey.pixels, files)
    number = clean.sample_numbers(range(bad_step * 7 + 2, bad_step * 7 + 3))[0]
    size = len(files[number])
    # the damage is done in the packed file: packing itself would not let such an image through
    shard = int(np.searchsorted(np.cumsum(SHARD_SIZES), number, side="right"))
    path = clean.folder / clean.manifest.shards[shard].name
    content = path.read_bytes()
    broken = files[number][:300] + bytes(size - 300) if damage == "truncated" else b"no image".ljust(size, b"\0")
    assert content.count(files[number]) == 1
    path.write_bytes(content.replace(files[number], broken))

    iterator = iter(clean.loader())
    assert [next(iterator).step for _ in range(bad_step)] == list(range(bad_step))
    with pytest.raises(UndecodableError, match=re.escape(f"s{number:04d}") + ".*" + re.escape(path.name)) as caught:
        next(iterator)
    assert caught.value.step == bad_step
    assert [sample.shard for sample in caught.value.samples] == [path.name]
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"s{number:04d}"):
        list(iterate_images(clean.folder, clean.manifest, WHOLE, 8))


def test_a_sample_that_only_dali_refuses_is_named(grey: DataSet, tmp_path: Path) -> None:
    files = [encode(image) for image in grey.pixels]
    files[10] = encode(grey.pixels[10], "gif")
    data = pack(tmp_path, grey.pixels, files)
    with pytest.raises(UndecodableError, match=r"s0010.*DALI does not decode this GIF image; convert it"):
        list(iterate_images(data.folder, data.manifest, WHOLE, 6))


def test_a_missing_shard_is_named(grey: DataSet, tmp_path: Path) -> None:
    data = pack(tmp_path, grey.pixels, [encode(image) for image in grey.pixels])
    name = data.manifest.shards[3].name
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        take(data.loader(), 20)


def test_a_shard_that_shrinks_under_the_run_is_named(grey: DataSet, tmp_path: Path) -> None:
    data = pack(tmp_path, grey.pixels, [encode(image) for image in grey.pixels])
    loader = data.loader(keys=KEYS[:8])
    for entry in data.manifest.shards:
        with (tmp_path / entry.name).open("r+b") as file:
            file.truncate(100)
    with pytest.raises(DataError, match=r"shard-0000\d\.tar has 100 bytes, not \d+"):
        take(loader, 20)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_balanced_batch_holds_so_many_images_of_so_many_identities(grey: DataSet, world_size: int) -> None:
    order = OrderConfig(balanced=BalancedConfig(identities=4, images=3))
    options: dict[str, Any] = {"order": order, "global_batch": 12, "augment": FULL}
    whole = take(grey.loader(**options), 4)
    assert [batch.labels_B.bincount().sort().values.tolist()[-4:] for batch in whole] == [[3] * 4] * 4
    ranks = [take(grey.loader(rank=rank, world_size=world_size, **options), 4) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step].images_BCHW for rank in ranks]), batch.images_BCHW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_samples_and_nearly_the_same_pixels(grey: DataSet) -> None:
    for augment in ({}, FULL):
        for one, two in zip(
            take(grey.loader(augment=augment), 9), take(grey.loader(augment=augment, device="cuda:0"), 9), strict=True
        ):
            assert torch.equal(one.labels_B, two.labels_B.cpu())
            assert (one.images_BCHW - two.images_BCHW.cpu()).abs().max() < 0.02
