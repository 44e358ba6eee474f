"""The three collectives of a step of the classifier, each once for all heads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.heads import NOT_HERE


def gather_batch(
    columns_bK: Tensor, labels_b: Tensor, longest: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Features (and what else there is of a sample) and labels of all ranks by one collective.

    A rank's part is padded to `longest` samples with labels that match nothing. The labels travel as further columns,
    their bits unchanged.
    """
    if group is None:
        return columns_bK.detach(), labels_b
    width = columns_bK.shape[1]
    bits_bL = labels_b[:, None].view(columns_bK.dtype)
    padding_1L = torch.full((1, 1), NOT_HERE, dtype=labels_b.dtype, device=labels_b.device).view(columns_bK.dtype)
    packed_bP = columns_bK.new_zeros(longest, width + bits_bL.shape[1])
    packed_bP[:, width:] = padding_1L
    packed_bP[: len(columns_bK)] = torch.cat([columns_bK.detach(), bits_bL], dim=1)
    all_BP = gather(packed_bP, group)
    return all_BP[:, :width].contiguous(), all_BP[:, width:].contiguous().view(labels_b.dtype).flatten()


def gather_labels(labels_b: Tensor, longest: int, group: dist.ProcessGroup | None) -> Tensor:
    """Labels of all ranks, padded as in `gather_batch`."""
    if group is None:
        return labels_b
    padded_b = labels_b.new_full((longest,), NOT_HERE)
    padded_b[: len(labels_b)] = labels_b
    return gather(padded_b, group)


def exchange(own_KBS: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(W, K, B, S) statistics of all losses and ranks by one collective."""
    if group is None:
        return own_KBS[None]
    return gather(own_KBS, group).view(-1, *own_KBS.shape)


def gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, one below the other."""
    whole = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
    dist.all_gather_single(whole, part.contiguous(), group=group)
    return whole


class ReduceScatter:
    """The sum over ranks of each rank's part of (B, D) rows, begun at once and waited for later."""

    def __init__(self, total_BD: Tensor, group: dist.ProcessGroup | None) -> None:
        self.total_BD = self.own_bD = total_BD
        self.work: dist.Work | None = None
        if group is not None:
            self.own_bD = total_BD.new_empty(len(total_BD) // dist.get_world_size(group), total_BD.shape[1])
            self.work = dist.reduce_scatter_single(self.own_bD, total_BD, group=group, async_op=True)

    def wait(self) -> Tensor:
        """(B / W, D) this rank's part."""
        if self.work is not None:
            self.work.wait()
        return self.own_bD
