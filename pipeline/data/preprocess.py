"""What is done to an image before the backbone sees it: always (preprocess), and in training (augment).

Augmentation is drawn here, as numbers, and applied by the loader. A sample's numbers are a pure function of
(seed, position in the run), so that a resumed run, on any number of ranks, sees the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.schema import Config

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BEST_QUALITY = 95  # of the JPEG that images may go through again
NOISE_STARTS = 1 << 20  # places in the noise bank at which a sample's noise may begin
DRAWS = 20  # numbers drawn for a sample; a change changes every augmentation


class PreprocessConfig(Config):
    """The fixed part, stored with every generation: images are only comparable through the same one."""

    size: int = Field(32, ge=8, le=1024, description="side of the square the backbone sees, pixels")
    resize: int = Field(36, ge=8, le=2048, description="side that images are resized to, of which the centre is taken")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: RGB")
    mean: float = Field(127.5, description="subtracted from pixel values of 0 to 255")
    std: float = Field(127.5, gt=0, description="divided by, after the mean")

    @model_validator(mode="after")
    def _has_a_centre(self) -> PreprocessConfig:
        if self.resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than size {self.size}: no square to take; raise resize")
        return self

    @property
    def margin(self) -> int:
        """Pixels left of and above the centre square; the right and lower margin has one more if they are odd."""
        return (self.resize - self.size) // 2


class AugmentConfig(Config):
    """The random part. Everything off by default; each figure is the largest change, drawn evenly around none.

    In this order: crop, colours, compression, rotation with scale and shift, blur, noise; the mirror anywhere.
    """

    crop: float = Field(1.0, gt=0, le=1, description="smallest share of the image's area that a crop keeps; 1: no crop")
    crop_ratio: float = Field(1.0, ge=1, le=4, description="largest stretch of a crop's sides, either way")
    brightness: float = Field(0.0, ge=0, lt=1, description="share")
    contrast: float = Field(0.0, ge=0, lt=1, description="share")
    saturation: float = Field(0.0, ge=0, le=1, description="share; of colour images")
    hue: float = Field(0.0, ge=0, le=180, description="degrees, either way; of colour images")
    grey: float = Field(0.0, ge=0, le=1, description="share of colour images that lose their colour")
    compress: float = Field(0.0, ge=0, le=1, description="share of images that go through JPEG once more")
    compress_quality: int = Field(30, ge=1, le=100, description="lowest quality of that JPEG; up to 95")
    rotate: float = Field(0.0, ge=0, le=180, description="degrees, either way")
    scale: float = Field(0.0, ge=0, lt=1, description="share of the size, larger or smaller")
    shift: float = Field(0.0, ge=0, description="pixels of the output, along each axis")
    flip: bool = Field(False, description="mirror every other image")
    blur: float = Field(0.0, ge=0, le=10, description="largest sigma of a Gaussian blur, pixels of the output")
    noise: float = Field(0.0, ge=0, description="largest sigma of Gaussian noise, in pixel values of 0 to 255")

    @property
    def warps(self) -> bool:
        """Whether pixels move between places; otherwise the centre square is cut out as it is."""
        return max(self.rotate, self.scale, self.shift) > 0

    @property
    def crops(self) -> bool:
        """Whether a part of the image is taken."""
        return self.crop < 1 or self.crop_ratio > 1

    def twists(self, channels: int) -> bool:
        """Whether colours change; a grey image has brightness and contrast alone."""
        coloured = channels == 3 and max(self.saturation, self.hue, self.grey) > 0
        return coloured or max(self.brightness, self.contrast) > 0


@dataclass(frozen=True)
class Draws:
    """The numbers of a batch's augmentation.

    Attributes:
        crops_B4: (B, 4) top, left, bottom and right of the part that is taken, in shares of the sides.
        colours_B4: (B, 4) factors of brightness, contrast and saturation, and the turn of the hue, degrees.
        compressed_B: (B,) bool: goes through JPEG again, at
        quality_B: (B,) int32 quality.
        mirrored_B: (B,) int32 1 or 0; of images that do not warp, for the matrices mirror too.
        matrices_B23: (B, 2, 3) from output to input pixels; (0, 0) is the corner of the first pixel.
        blur_B: (B,) sigmas of the blur, pixels.
        noise_B: (B,) sigmas of the noise, in pixel values of 0 to 255.
        noise_starts_B: (B,) where each sample's noise begins in the bank.
    """

    crops_B4: Floats
    colours_B4: Floats
    compressed_B: npt.NDArray[np.bool_]
    quality_B: npt.NDArray[np.int32]
    mirrored_B: npt.NDArray[np.int32]
    matrices_B23: Floats
    blur_B: Floats
    noise_B: Floats
    noise_starts_B: Ints


def draw_parameters(config: AugmentConfig, preprocess: PreprocessConfig, seed: int, positions_B: Ints) -> Draws:
    """Draw the numbers of each sample.

    Args:
        config: ranges.
        preprocess: sizes.
        seed: of the run, at least 0.
        positions_B: (B,) place of each sample in the run's endless order (epoch * samples + place in the epoch).
    """
    draws_BK = _uniform(seed, positions_B, DRAWS)
    return Draws(
        crops_B4=_crops(config, draws_BK[:, 8:12]),
        colours_B4=_colours(config, draws_BK[:, 12:17]),
        compressed_B=draws_BK[:, 17] < config.compress,
        quality_B=(config.compress_quality + (BEST_QUALITY - config.compress_quality) * draws_BK[:, 18]).astype(
            np.int32
        ),
        mirrored_B=(config.flip & (draws_BK[:, 6] < 0.5)).astype(np.int32),
        matrices_B23=_matrices(config, preprocess, draws_BK),
        blur_B=(config.blur * draws_BK[:, 4]).astype(np.float32),
        noise_B=(config.noise * draws_BK[:, 5]).astype(np.float32),
        noise_starts_B=(NOISE_STARTS * draws_BK[:, 7]).astype(np.int64),
    )


def _crops(config: AugmentConfig, draws_BK: npt.NDArray[np.float64]) -> Floats:
    """(B, 4) crops: area between `crop` and 1, sides stretched by up to `crop_ratio`, anywhere within the image."""
    area_B = config.crop + (1 - config.crop) * draws_BK[:, 0]
    stretch_B = config.crop_ratio ** (draws_BK[:, 1] - 0.5)
    sides_B2 = np.minimum(np.sqrt(area_B)[:, None] * np.stack([stretch_B, 1 / stretch_B], axis=1), 1.0)
    start_B2 = (1 - sides_B2) * draws_BK[:, 2:4]
    return np.concatenate([start_B2, start_B2 + sides_B2], axis=1).astype(np.float32)


def _colours(config: AugmentConfig, draws_BK: npt.NDArray[np.float64]) -> Floats:
    """(B, 4) factors of brightness, contrast and saturation (0: grey), and turns of the hue."""
    largest_3 = np.array([config.brightness, config.contrast, config.saturation])
    factors_B3 = 1 + largest_3 * (2 * draws_BK[:, :3] - 1)
    factors_B3[draws_BK[:, 4] < config.grey, 2] = 0.0
    hue_B1 = config.hue * (2 * draws_BK[:, 3:4] - 1)
    return np.concatenate([factors_B3, hue_B1], axis=1).astype(np.float32)


def _matrices(config: AugmentConfig, preprocess: PreprocessConfig, draws_BK: npt.NDArray[np.float64]) -> Floats:
    """(B, 2, 3) matrices that turn, scale, mirror and shift about the middle of the centre square."""
    angle_B = np.deg2rad(config.rotate) * (2 * draws_BK[:, 0] - 1)
    zoom_B = 1 / (1 + config.scale * (2 * draws_BK[:, 1] - 1))
    mirror_B = np.where(config.flip & (draws_BK[:, 6] < 0.5), -1.0, 1.0)
    matrix_B23 = np.empty((len(draws_BK), 2, 3))
    matrix_B23[:, 0, 0] = zoom_B * np.cos(angle_B) * mirror_B
    matrix_B23[:, 0, 1] = -zoom_B * np.sin(angle_B)
    matrix_B23[:, 1, 0] = zoom_B * np.sin(angle_B) * mirror_B
    matrix_B23[:, 1, 1] = zoom_B * np.cos(angle_B)
    shift_B2 = config.shift * (2 * draws_BK[:, 2:4] - 1)
    centre = preprocess.size / 2
    matrix_B23[:, :, 2] = preprocess.margin + centre - np.einsum("bij,bj->bi", matrix_B23[:, :, :2], centre + shift_B2)
    return matrix_B23.astype(np.float32)


def noise_bank(seed: int, pixels: int) -> Floats:
    """(NOISE_STARTS + pixels - 1,) standard normal values, of which each sample takes a run of `pixels`.

    A stream of its own for each sample cost as much as decoding it (50 of 150 microseconds for 32 x 32). Within a
    sample the noise is independent; two samples get the same run with odds of one in a million.
    """
    stream = np.random.Generator(np.random.Philox(key=[seed, 1]))
    return stream.standard_normal(NOISE_STARTS + pixels - 1, dtype=np.float32)


def _uniform(seed: int, positions_B: Ints, count: int) -> npt.NDArray[np.float64]:
    """(B, count) in [0, 1) by a counter-based hash (splitmix64) of (seed, position, draw)."""
    start = (seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64
    mixed = (positions_B[:, None] * count + np.arange(count)).astype(np.uint64) + np.uint64(start)
    for _ in range(2):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = (mixed ^ (mixed >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
