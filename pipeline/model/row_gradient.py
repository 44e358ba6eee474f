"""Where the gradient of a rank's prototypes waits for the update."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.implementations import Sink
from pipeline.parts import part

Columns = slice | Tensor  # prototypes of a rank: a span of them, or (K,) int64 places, ascending


def span(columns: Tensor | None, first: int, count: int) -> Columns:
    """Of the prototypes that take part in a step (None: all), those from `first` on."""
    return slice(first, first + count) if columns is None else columns[first : first + count]


class RowGradient:
    """Sum of the gradients of one update's batches, for those prototypes that take part in it.

    Attributes:
        columns: (K,) int64, which of the rank's prototypes; None: all.
        values_KD: (K, D) their gradient; None before the first batch.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.values_KD: Tensor | None = None

    def sink(self, columns: Tensor | None, weight_KD: Tensor) -> Sink:
        """Take a batch's tiles: the first batch writes, the others add."""
        if self.values_KD is None:
            self.columns, self.values_KD = columns, torch.empty_like(weight_KD)
            return self._write
        return self._add

    def _write(self, first: int, gradient_TD: Tensor) -> None:
        assert self.values_KD is not None
        self.values_KD[first : first + len(gradient_TD)] = gradient_TD

    def _add(self, first: int, gradient_TD: Tensor) -> None:
        assert self.values_KD is not None
        self.values_KD[first : first + len(gradient_TD)] += gradient_TD

    def total(self, replicas: dist.ProcessGroup | None) -> Tensor:
        """(K, D) over all replicas of these rows. Collective; once an update."""
        assert self.values_KD is not None, "no backward yet"
        if replicas is not None:
            with part("reduce"):
                dist.all_reduce(self.values_KD, group=replicas)
        return self.values_KD

    def clear(self) -> None:
        """Forget it, for the next update."""
        self.columns = self.values_KD = None
