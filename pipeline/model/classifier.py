"""The classifier sharded by identity over the ranks, with the parents' frozen classifiers beside it.

However many heads there are, a step costs three collectives: one gather of features and labels, one exchange of
softmax statistics, one reduce-scatter of feature gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.model.heads import NOT_HERE, STATISTICS, Head, HeadBatch, combine, gradients, statistics
from pipeline.model.margins import MarginConfig
from pipeline.model.rows import batch_parts, initial_rows, row_range


class ShardedClassifier(nn.Module):
    """Rank r's rows of a (rows, dim) classifier, and the losses of a batch against it and its parents.

    The parameter is a plain tensor of this rank's rows: it belongs to an optimiser of this rank, not to the engine
    that replicates the backbone (the engine would overwrite every shard with rank 0's).

    Args:
        name: of the generation being trained; the first loss.
        rows: identities of the whole classifier.
        dim: embedding dimension.
        margin: of the new classifier.
        parents: frozen heads, this rank's part of each, aligned to the same identity table.
        seed: of the initial rows, which are the same at every world size.
        group: process group; None for a single process.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        dim: int,
        margin: MarginConfig,
        parents: Sequence[Head] = (),
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.group = rows, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.first_row, self.end_row = row_range(rows, self.rank, self.world_size)
        self.weight_CD = nn.Parameter(initial_rows(self.first_row, self.end_row, dim, seed))
        self.name, self.margin, self.parents = name, margin, tuple(parents)
        assert not any(parent.weight_CD.requires_grad for parent in self.parents)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The new head, then the parents'."""
        own_rows = torch.arange(self.first_row, self.end_row, device=self.weight_CD.device)
        return (Head(self.name, self.weight_CD, own_rows, self.margin), *self.parents)

    def forward(self, features_bD: Tensor, labels_b: Tensor, global_batch: int) -> Tensor:
        """Losses of the global batch, one a head, the same on every rank.

        Each loss is the mean of log-sum-exp minus own logit over those samples of the global batch whose identity
        has a prototype in that head; 0 where none has. `backward` gives each rank the gradient of these global
        means with respect to its own features and rows: nothing is left to be averaged.

        Args:
            features_bD: (b, D) float32 or float64, this rank's part of the global batch, not normalised.
            labels_b: (b,) int64 rows of the identity table.
            global_batch: samples over all ranks; rank r has `batch_parts(global_batch, world_size)[r]` of them.

        Returns:
            (1 + parents,) losses.

        Raises:
            DataError: a label is outside the table.
        """
        self._check(labels_b)
        parts = batch_parts(global_batch, self.world_size)
        assert len(features_bD) == len(labels_b) == parts[self.rank], "not this rank's part of the global batch"
        arguments = (features_bD, self.weight_CD, labels_b, self.heads, parts, self.group)
        losses_H: Tensor = _ShardedSoftmax.apply(*arguments)  # type: ignore[no-untyped-call]
        return losses_H

    def _check(self, labels_b: Tensor) -> None:
        outside_K = labels_b[(labels_b < 0) | (labels_b >= self.rows)]
        if len(outside_K):
            raise DataError(
                f"label {int(outside_K[0])} is outside the identity table of {self.rows} rows: "
                "the shards and the table do not fit; pack the data set again"
            )


class _ShardedSoftmax(torch.autograd.Function):
    """Losses forward, tiles recomputed backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features_bD: Tensor,
        weight_CD: Tensor,  # noqa: ARG004  an argument so that autograd hands it its gradient
        labels_b: Tensor,
        heads: tuple[Head, ...],
        parts: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        features_BD, labels_B = _gather(features_bD, labels_b, max(parts), group)
        batches = [HeadBatch.of(head, features_BD, labels_B) for head in heads]
        own_HBS = torch.stack([statistics(batch) for batch in batches])
        losses, log_sum_exps, weights = [], [], []
        for statistics_WBS in _exchange(own_HBS, group).unbind(dim=1):
            log_sum_exp_B, own_B, has_prototype_B = combine(statistics_WBS)
            weight_B = has_prototype_B / has_prototype_B.sum().clamp_min(1)  # global mean over samples with a prototype
            losses.append(torch.where(has_prototype_B, log_sum_exp_B - own_B, 0.0).mul(weight_B).sum())
            log_sum_exps.append(log_sum_exp_B)
            weights.append(weight_B.to(features_BD.dtype))
        ctx.batches, ctx.log_sum_exps, ctx.weights, ctx.group = batches, log_sum_exps, weights, group
        ctx.shape = features_bD.shape
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *loss_gradients_H: Tensor) -> tuple[Tensor | None, ...]:
        (loss_gradient_H,) = loss_gradients_H
        samples, dim = ctx.shape
        world_size = 1 if ctx.group is None else dist.get_world_size(ctx.group)
        total_BD = ctx.weights[0].new_zeros(len(ctx.weights[0]), dim)
        weight_gradient_CD = None
        for batch, log_sum_exp_B, weight_B, factor in zip(
            ctx.batches, ctx.log_sum_exps, ctx.weights, loss_gradient_H, strict=True
        ):
            feature_gradient_BD, head_gradient_CD = gradients(batch, log_sum_exp_B, weight_B * factor)
            total_BD[:, : feature_gradient_BD.shape[1]] += feature_gradient_BD
            weight_gradient_CD = head_gradient_CD if head_gradient_CD is not None else weight_gradient_CD
        if world_size > 1:
            own_bD = total_BD.new_empty(len(total_BD) // world_size, dim)
            dist.reduce_scatter_single(own_bD, total_BD, group=ctx.group)
            total_BD = own_bD
        return total_BD[:samples], weight_gradient_CD, None, None, None, None


def _gather(
    features_bD: Tensor, labels_b: Tensor, longest: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Features and labels of all ranks by one collective, padded to `longest` a rank with labels that match nothing.

    The labels travel as further columns, their bits unchanged.
    """
    if group is None:
        return features_bD.detach(), labels_b
    dim = features_bD.shape[1]
    bits_bL = labels_b[:, None].view(features_bD.dtype)
    padding_1L = torch.full((1, 1), NOT_HERE, dtype=labels_b.dtype, device=labels_b.device).view(features_bD.dtype)
    packed_bK = features_bD.new_zeros(longest, dim + bits_bL.shape[1])
    packed_bK[:, dim:] = padding_1L
    packed_bK[: len(features_bD)] = torch.cat([features_bD.detach(), bits_bL], dim=1)
    all_BK = packed_bK.new_empty(dist.get_world_size(group) * longest, packed_bK.shape[1])
    dist.all_gather_single(all_BK, packed_bK, group=group)
    return all_BK[:, :dim].contiguous(), all_BK[:, dim:].contiguous().view(labels_b.dtype).flatten()


def _exchange(own_HBS: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(W, H, B, S) statistics of all heads and ranks by one collective."""
    if group is None:
        return own_HBS[None]
    world_size = dist.get_world_size(group)
    all_WHBS = own_HBS.new_empty(world_size * own_HBS.shape[0], *own_HBS.shape[1:])
    dist.all_gather_single(all_WHBS, own_HBS.contiguous(), group=group)
    assert own_HBS.shape[-1] == STATISTICS
    return all_WHBS.view(world_size, *own_HBS.shape)
