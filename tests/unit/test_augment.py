"""Each augmentation by itself, against what it is drawn to be; and samples that do not decode."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.data.preprocess import AugmentConfig, Draws, PreprocessConfig, draw_parameters
from pipeline.data.quarantine import Quarantine, read_quarantine
from pipeline.errors import DataError
from tests.unit.test_loader import DataSet, encode, pack, random_image, same, take

COLOUR = PreprocessConfig(size=40, resize=40, channels=3)
BATCH, COUNT = 7, 51
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(random_image(rng, 5, 5, 3)) for _ in range(COUNT)]
    pixels = [np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)) for image in small]
    return pack(tmp_path_factory.mktemp("colour"), pixels, [encode(image) for image in pixels])


def augmented(data: DataSet, **augment: Any) -> list[tuple[Floats, Floats, Draws, int]]:
    """Each sample before and after, with the draws of its batch and its place there."""
    out = []
    for batch in take(data.loader(preprocess=COLOUR, augment=augment), 8):
        positions = range(batch.step * BATCH, (batch.step + 1) * BATCH)
        draws = draw_parameters(AugmentConfig(**augment), COLOUR, 3, np.array(positions))
        images = batch.images_BCHW.double().numpy().transpose(0, 2, 3, 1) * 127.5 + 127.5
        for row, number in enumerate(data.sample_numbers(positions)):
            out.append((data.pixels[number].astype(float), images[row], draws, row))
    return out


def test_flip_mirrors_half_of_the_images_exactly(colour: DataSet) -> None:
    mirrored = 0
    for before, after, draws, row in augmented(colour, flip=True):
        expected = before[:, ::-1] if draws.mirrored_B[row] else before
        assert np.abs(after - expected).max() < 1e-3
        mirrored += int(draws.mirrored_B[row])
    assert 15 < mirrored < 41


def test_crop_takes_the_drawn_part(colour: DataSet) -> None:
    for before, after, draws, row in augmented(colour, crop=0.3, crop_ratio=1.5):
        top, left, bottom, right = (draws.crops_B4[row] * 40).tolist()
        expected = np.asarray(
            Image.fromarray(before.astype(np.uint8)).resize(
                (40, 40), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
            ),
            float,
        )
        assert np.abs(after - expected)[2:-2, 2:-2].max() < 4
    sides = np.concatenate([d.crops_B4[r, 2:] - d.crops_B4[r, :2] for _, _, d, r in augmented(colour, crop=0.3)])
    assert 0.5 < sides.min() < 0.7
    assert sides.max() <= 1


def test_brightness_and_contrast_are_the_drawn_factors(colour: DataSet) -> None:
    for before, after, draws, row in augmented(colour, brightness=0.4):
        assert np.abs(after - (before * draws.colours_B4[row, 0]).clip(0, 255)).max() < 1.5
    for before, after, draws, row in augmented(colour, contrast=0.4):
        assert np.abs(after - ((before - 128) * draws.colours_B4[row, 1] + 128).clip(0, 255)).max() < 2.5


def luma(image: Floats) -> Floats:
    weighted: Floats = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return weighted


def test_grey_takes_the_colour_of_the_drawn_share(colour: DataSet) -> None:
    greyed = 0
    for before, after, draws, row in augmented(colour, grey=0.5):
        if draws.colours_B4[row, 2] == 0:
            greyed += 1
            assert np.abs(after - luma(before)[..., None]).max() < 2.5
        else:
            assert np.abs(after - before).max() < 1.5
    assert 15 < greyed < 41


def test_saturation_and_hue_keep_the_brightness(colour: DataSet) -> None:
    for augment in ({"saturation": 0.5}, {"hue": 20.0}):
        changed = 0.0
        for before, after, _, _ in augmented(colour, **augment):
            inside = (after > 1).all(axis=2) & (after < 254).all(axis=2)
            assert np.abs(luma(after) - luma(before))[inside].max(initial=0) < 3
            changed = max(changed, float(np.abs(after - before).max()))
        assert changed > 10


def test_compression_is_that_of_the_drawn_quality(colour: DataSet) -> None:
    compressed = 0
    for before, after, draws, row in augmented(colour, compress=0.5, compress_quality=20):
        if not draws.compressed_B[row]:
            assert np.abs(after - before).max() < 1e-3
            continue
        compressed += 1
        stream = io.BytesIO()
        Image.fromarray(before.astype(np.uint8)).save(stream, "jpeg", quality=int(draws.quality_B[row]))
        expected = np.asarray(Image.open(stream), float)
        assert np.abs(after - expected).mean() < 2.5
        assert 20 <= draws.quality_B[row] <= 95
    assert 15 < compressed < 41


def test_grey_images_take_brightness_and_contrast(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = [random_image(rng, 40, 40) for _ in range(COUNT)]
    data = pack(tmp_path, pixels, [encode(image) for image in pixels])
    grey = COLOUR.model_copy(update={"channels": 1})
    augment = {"brightness": 0.3, "saturation": 0.5, "hue": 90.0, "grey": 0.5}
    (batch,) = take(data.loader(preprocess=grey, augment=augment), 1)
    draws = draw_parameters(AugmentConfig.model_validate(augment), grey, 3, np.arange(BATCH))
    for row, number in enumerate(data.sample_numbers(range(BATCH))):
        after = batch.images_BCHW[row, 0].double().numpy() * 127.5 + 127.5
        assert np.abs(after - (data.pixels[number] * draws.colours_B4[row, 0]).clip(0, 255)).max() < 1.5


# Quarantine


def broken(tmp_path: Path, numbers: list[int]) -> DataSet:
    """A data set whose shards were damaged after packing."""
    rng = np.random.default_rng(3)
    pixels = [random_image(rng, 40, 40) for _ in range(COUNT)]
    files = [encode(image) for image in pixels]
    data = pack(tmp_path, pixels, files)
    for entry in data.manifest.shards:
        path = data.folder / entry.name
        content = path.read_bytes()
        for number in numbers:
            content = content.replace(files[number], b"no image".ljust(len(files[number]), b"\0"))
        path.write_bytes(content)
    return data


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samples_that_do_not_decode_are_replaced_alike_on_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    data, bad = broken(tmp_path / "data", [4, 17, 18, 40]), {4, 17, 18, 40}
    whole = take(data.loader(quarantine=Quarantine(None, 0, 10)), 16)
    for step, batch in enumerate(whole):
        for row, number in enumerate(data.sample_numbers(range(step * BATCH, (step + 1) * BATCH))):
            pixels = (batch.images_BCHW[row, 0].double().numpy() * 127.5 + 127.5).round()
            if number not in bad:
                assert np.array_equal(pixels, data.pixels[number][4:36, 4:36]), "no good sample is lost"
                continue
            (other,) = (n for n in range(COUNT) if np.array_equal(pixels, data.pixels[n][4:36, 4:36]))
            assert other not in bad
            assert int(batch.labels_B[row]) == int(data.identities[other].removeprefix("id-")), "under its own label"
    folder = tmp_path / "notes"
    ranks = [
        take(data.loader(rank=rank, world_size=world_size, quarantine=Quarantine(folder, rank, 10)), 16)
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(torch.cat([part.images_BCHW for part in parts]), whole[step].images_BCHW)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), whole[step].labels_B)
    keys = {Path(entry["key"]).stem for entry in read_quarantine(folder)}
    assert keys == {f"s{number:04d}" for number in bad}
    resumed = take(data.loader(start_step=9, quarantine=Quarantine(folder, 0, 10)), 3)
    assert same(resumed, whole[9:12])


def test_too_many_samples_that_do_not_decode_end_the_run(tmp_path: Path) -> None:
    data = broken(tmp_path / "data", list(range(20)))
    with pytest.raises(
        DataError, match=r"samples do not decode, more than data.quarantine_limit=3; last: '.*' of shard"
    ):
        take(data.loader(quarantine=Quarantine(tmp_path / "notes", 0, 3)), 40)
    assert len(read_quarantine(tmp_path / "notes")) > 3, "what was found is written down"


def test_a_data_set_of_nothing_but_broken_samples_ends(tmp_path: Path) -> None:
    data = broken(tmp_path / "data", list(range(COUNT)))
    with pytest.raises(DataError, match="no sample is left that decodes"):
        take(data.loader(quarantine=Quarantine(None, 0, 1000)), 1)


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    line = json.dumps({"shard": "a.tar", "key": "k.png", "reason": "broken", "step": 3})
    (tmp_path / "quarantine-00000.jsonl").write_text(line + "\n" + line[:20])
    assert [entry["key"] for entry in read_quarantine(tmp_path)] == ["k.png"]
    assert len(Quarantine(tmp_path, 1, 5)) == 1
