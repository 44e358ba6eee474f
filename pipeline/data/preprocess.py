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

NOISE_STARTS = 1 << 20  # places in the noise bank at which a sample's noise may begin
DRAWS = 8  # numbers drawn for a sample; a change changes every augmentation


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
    """The random part. Everything off by default; each figure is the largest change, drawn evenly around none."""

    rotate: float = Field(0.0, ge=0, le=180, description="degrees, either way")
    scale: float = Field(0.0, ge=0, lt=1, description="share of the size, larger or smaller")
    shift: float = Field(0.0, ge=0, description="pixels of the output, along each axis")
    flip: bool = Field(False, description="mirror every other image")
    blur: float = Field(0.0, ge=0, le=10, description="largest sigma of a Gaussian blur, pixels of the output")
    noise: float = Field(0.0, ge=0, description="largest sigma of Gaussian noise, in pixel values of 0 to 255")

    @property
    def warps(self) -> bool:
        """Whether pixels move at all; otherwise the centre square is cut out as it is."""
        return self.flip or max(self.rotate, self.scale, self.shift) > 0


@dataclass(frozen=True)
class Draws:
    """The numbers of a batch's augmentation.

    Attributes:
        matrices_B23: (B, 2, 3) from output to input pixels; (0, 0) is the corner of the first pixel.
        blur_B: (B,) sigmas of the blur, pixels.
        noise_B: (B,) sigmas of the noise, in pixel values of 0 to 255.
        noise_starts_B: (B,) where each sample's noise begins in the bank.
    """

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
        matrices_B23=_matrices(config, preprocess, draws_BK),
        blur_B=(config.blur * draws_BK[:, 4]).astype(np.float32),
        noise_B=(config.noise * draws_BK[:, 5]).astype(np.float32),
        noise_starts_B=(NOISE_STARTS * draws_BK[:, 7]).astype(np.int64),
    )


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
