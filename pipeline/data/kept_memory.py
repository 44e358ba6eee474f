"""Memory of batches that is used again: fresh pages cost ten times as much as what is computed into them."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KEPT = 4  # blocks: the trainer's batch, the one before it, and what a consumer may hold beside them


class KeptMemory:
    """Gives tensors out of a few blocks, each again once no tensor of it is left; beyond them, fresh ones.

    Args:
        shape: (B, ...) of the largest tensor.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._blocks: list[tuple[npt.NDArray[np.float32], weakref.ref[npt.NDArray[np.float32]]]] = []

    def tensor(self, rows: int) -> Tensor:
        """(rows, ...) float32 of any content; its memory is its own as long as it, a view, or a graph holds it."""
        place = next((place for place, (_, used) in enumerate(self._blocks) if used() is None), len(self._blocks))
        block = self._blocks[place][0] if place < len(self._blocks) else np.empty(self._shape, np.float32)
        part = block[:rows]  # the tensor's memory holds this very object, and nothing else does
        if place < KEPT:
            self._blocks[place : place + 1] = [(block, weakref.ref(part))]
        return torch.from_numpy(part)
