"""Augmentation as numbers: ranges, geometry and independence of how a run is cut."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.data.preprocess import (
    NOISE_STARTS,
    AugmentConfig,
    Draws,
    PreprocessConfig,
    draw_parameters,
    noise_bank,
)

SIZES = PreprocessConfig(size=32, resize=36)


def draw(positions: Any, seed: int = 3, preprocess: PreprocessConfig = SIZES, **augment: Any) -> Draws:
    return draw_parameters(AugmentConfig(**augment), preprocess, seed, np.asarray(positions, np.int64))


def parts(draws: Draws) -> list[np.ndarray[Any, Any]]:
    return [draws.matrices_B23, draws.blur_B, draws.noise_B, draws.noise_starts_B]


FULL: dict[str, Any] = {"rotate": 15.0, "scale": 0.15, "shift": 3.0, "flip": True, "blur": 1.2, "noise": 40.0}


def test_nothing_on_cuts_out_the_centre() -> None:
    draws = draw([0, 1, 10**12])
    assert np.array_equal(draws.matrices_B23, [[[1, 0, 2], [0, 1, 2]]] * 3)
    assert not draws.blur_B.any()
    assert not draws.noise_B.any()


def test_an_odd_margin_is_still_whole_pixels() -> None:
    preprocess = PreprocessConfig(size=32, resize=35)
    assert preprocess.margin == 1
    assert np.array_equal(draw([5], preprocess=preprocess).matrices_B23[0], [[1, 0, 1], [0, 1, 1]])


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = parts(draw(range(100), **FULL))
    part = parts(draw([99, 17, 42], **FULL))
    for all_, some in zip(whole, part, strict=True):
        assert np.array_equal(all_[[99, 17, 42]], some)


def test_positions_and_seeds_draw_apart() -> None:
    first = draw(range(1000), **FULL).matrices_B23.reshape(1000, -1)
    other = draw(range(1000), seed=4, **FULL).matrices_B23.reshape(1000, -1)
    assert len(np.unique(np.concatenate([first, other]), axis=0)) == 2000


def test_the_matrix_turns_scales_and_shifts_about_the_centre() -> None:
    """Reads angle, zoom, mirror and shift back out of the matrices, and holds them against the config's ranges."""
    linear = (matrices := draw(range(20_000), **FULL).matrices_B23.astype(np.float64))[:, :, :2]
    mirror = np.sign(np.linalg.det(linear))
    linear = linear * np.stack([mirror, np.ones_like(mirror)], 1)[:, None, :]
    zoom = np.sqrt(np.linalg.det(linear))
    angle = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    # the output point that shows the middle of the input
    middle = np.linalg.solve(matrices[:, :, :2], (18 - matrices[:, :, 2])[:, :, None])[:, :, 0] - 16
    assert np.allclose(linear[:, 0, 0], linear[:, 1, 1], atol=1e-5)
    assert np.allclose(linear[:, 0, 1], -linear[:, 1, 0], atol=1e-5)
    for value, least, most in (
        (angle, -15, 15),
        (1 / zoom, 0.85, 1.15),
        (middle[:, 0], -3, 3),
        (middle[:, 1], -3, 3),
    ):
        width = most - least
        assert least - 1e-3 <= value.min() < least + 0.01 * width
        assert most - 0.01 * width < value.max() <= most + 1e-3
        assert np.std(value) == pytest.approx(width / np.sqrt(12), rel=0.03)
        assert np.mean(value) == pytest.approx((least + most) / 2, abs=0.02 * width)
    assert np.mean(mirror) == pytest.approx(0, abs=0.05)
    assert np.abs(np.corrcoef([angle, zoom, middle[:, 0], middle[:, 1], mirror]) - np.eye(5)).max() < 0.04


def test_sigmas_fill_their_ranges() -> None:
    draws = draw(range(20_000), **FULL)
    for sigma, most in ((draws.blur_B, 1.2), (draws.noise_B, 40)):
        assert sigma.dtype == np.float32
        assert 0 <= sigma.min() < 0.01 * most
        assert 0.99 * most < sigma.max() <= most
        assert sigma.mean() == pytest.approx(most / 2, rel=0.03)
    assert draws.noise_starts_B.min() >= 0
    assert 0.99 * NOISE_STARTS < draws.noise_starts_B.max() < NOISE_STARTS


def test_consecutive_positions_are_not_related() -> None:
    angle = draw(range(20_000), rotate=180.0).matrices_B23[:, 1, 0]
    assert abs(np.corrcoef(angle[:-1], angle[1:])[0, 1]) < 0.03


def test_the_bank_is_standard_normal_and_long_enough() -> None:
    bank = noise_bank(3, 1024)
    assert bank.shape == (NOISE_STARTS + 1023,)
    assert bank.mean() == pytest.approx(0, abs=5e-3)
    assert bank.std() == pytest.approx(1, abs=5e-3)
    assert abs(np.corrcoef(bank[:-1], bank[1:])[0, 1]) < 5e-3
    assert np.array_equal(bank[:100], noise_bank(3, 7)[:100])
    assert not np.array_equal(bank[:100], noise_bank(4, 7)[:100])


@pytest.mark.parametrize(
    ("augment", "warps"),
    [({}, False), ({"blur": 1.0, "noise": 4.0}, False), ({"flip": True}, False), ({"shift": 0.5}, True)],
)
def test_only_geometry_moves_pixels(augment: dict[str, Any], warps: bool) -> None:
    assert AugmentConfig(**augment).warps is warps


def test_a_square_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValidationError, match="resize 30 is smaller than size 32"):
        PreprocessConfig(size=32, resize=30)


@pytest.mark.parametrize("wrong", [{"rotate": -1.0}, {"scale": 1.0}, {"blur": 11.0}, {"cutout": 1.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**wrong)
