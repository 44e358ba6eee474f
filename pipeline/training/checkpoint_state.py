"""What a checkpoint holds of the classifier, in row ranges for any world size, and the copy that is written."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from pipeline.model.classifier import ShardedClassifier
from pipeline.training.row_optimiser import RowOptimiser

BLOCK_ROWS = 1 << 16  # rows of a classifier that are read as one

State = dict[str, dict[str, Tensor]]


def rows_state(classifier: ShardedClassifier, optimiser: RowOptimiser) -> dict[str, Tensor]:
    """The classifier's rows, their optimiser state and parents' rows that move, each this rank's range of a tensor.

    The range is cut at multiples of BLOCK_ROWS: a rank of another world size reads those blocks that hold its rows.
    """
    grid = classifier.mesh.grid
    assert grid is not None, "checkpoints are written by a process group"
    moving = {f"follows.{head.name}": head.weight_CD for head in classifier.followers.heads}
    parts = {"weight": classifier.weight_CD, **optimiser.slots, **moving}
    return {
        name: DTensor.from_local(
            _in_blocks(part, classifier.first_row),
            grid,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=torch.Size((classifier.rows, part.shape[1])),
            stride=(part.shape[1], 1),
        )
        for name, part in parts.items()
    }


def _in_blocks(part: Tensor, first_row: int) -> Tensor:
    end_row = first_row + len(part)
    inner = range(-(-(first_row + 1) // BLOCK_ROWS) * BLOCK_ROWS, end_row, BLOCK_ROWS)
    edges = [first_row, *inner, end_row] if len(part) else []
    blocks = [part[start - first_row : stop - first_row] for start, stop in pairwise(edges)]
    return LocalShardsWrapper(blocks, [(start, 0) for start in edges[:-1]])


class Staging:
    """Takes the copy that is written while training goes on; torch calls this a stager.

    The copy's memory, as much as the state has, is kept from one checkpoint to the next: fresh memory takes the system
    longer to give than the copying takes. Torch's own stagers cannot copy a tensor that is held in blocks.
    """

    should_synchronize_after_execute = False

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def stage(self, state: State) -> State:
        """Copy into main memory."""
        return {
            part: {name: self._whole(f"{part}.{name}", tensor) for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return self._copy(name, tensor)
        local = cast(LocalShardsWrapper, tensor.to_local())
        offsets = [tuple(offset) for offset in local.local_offsets()]
        blocks = [
            self._copy(f"{name}@{offset}", block) for block, offset in zip(local.local_shards(), offsets, strict=True)
        ]
        # `from_local` would take it back to the mesh's device.
        return DTensor(LocalShardsWrapper(blocks, offsets), tensor._spec, requires_grad=False)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape:
            held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._held[name] = held
        return held.copy_(tensor.detach())
