"""Losses that leap above those before them, and the way back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOW = 64  # losses that a new one is compared with
FEWEST = 16  # of them, before anything is said
SIGMA = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST = 1e-3  # deviation, over the median, that a loss is granted at the least


class Course:
    """What the losses of a run were of late, and how often it stood still or went back.

    All of it is in tensors that checkpoints hold, so that a run that was resumed finds the same spikes.

    Attributes:
        kept: the tensors, by name.
    """

    def __init__(self) -> None:
        self._losses_W = torch.full((WINDOW,), math.nan, dtype=torch.float64)
        self._counts = torch.zeros(6, dtype=torch.int64)
        self.kept: dict[str, Tensor] = {"losses": self._losses_W, "counts": self._counts}

    @property
    def unusable(self) -> int:
        """Steps on which nobody moved."""
        return int(self._counts[0])

    @property
    def spikes(self) -> int:
        """Spikes so far, each of one step or of several in a row."""
        return int(self._counts[1])

    @property
    def rewinds(self) -> int:
        """Times that the run went back."""
        return int(self._counts[2])

    @property
    def skipped(self) -> int:
        """Batches that were taken out of the order by going back: step t trains on batch t + skipped."""
        return int(self._counts[3])

    def stood_still(self) -> None:
        """Count a step on which nobody moved."""
        self._counts[0] += 1

    def goes_back(self, batches: int, before: Tensor) -> None:
        """Skip batches, after a checkpoint was restored over what `counts` gave `before`."""
        self._counts[1:4] = before[1:4]
        self._counts[2] += 1
        self._counts[3] += batches

    def counts(self) -> Tensor:
        """A copy of what `goes_back` needs."""
        return self._counts.clone()

    def add(self, loss: float, factor: float) -> float | None:
        """Take note of a loss; if it begins a spike, how many deviations it lies above the median.

        Args:
            loss: finite.
            factor: deviations from which on it is a spike.
        """
        known_K = self._losses_W[~self._losses_W.isnan()]
        above = deviations(loss, known_K) if len(known_K) >= FEWEST else 0.0
        self._losses_W[int(self._counts[4]) % WINDOW] = loss
        self._counts[4] += 1
        begins = above > factor and not self._counts[5]
        self._counts[5] = int(above > factor)
        self._counts[1] += int(begins)
        return above if begins else None


def deviations(loss: float, known_K: Tensor) -> float:
    """How many robust standard deviations a loss lies above the median of (K,) others."""
    median = known_K.median()
    spread = max(SIGMA * float((known_K - median).abs().median()), LEAST * abs(float(median)), 1e-12)
    return (loss - float(median)) / spread
