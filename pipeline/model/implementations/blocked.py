"""Tiles of prototypes in plain torch: the logits of one tile at a time, small enough for a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.model.heads import HeadBatch, Scan, inverse_length, through_unit_
from pipeline.model.implementations import Sink

TILE_ROWS = 8192  # at most
TILE_LOGITS = 1 << 20  # at most: larger batches take shorter tiles


def tile_rows(samples: int) -> int:
    """Prototypes of one tile for a batch of `samples`."""
    return max(1, min(TILE_ROWS, max(256, TILE_LOGITS // max(samples, 1))))


def product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """(M, N) = a @ b.T.

    On a CPU in float32 by oneDNN, which torch itself takes for lower precisions only: on processors with AVX-512 it
    is up to twice as fast as what `torch.mm` calls, in the same precision (docs/classifier.md).
    """
    if a_MK.device.type == "cpu" and a_MK.dtype == torch.float32 and a_MK.numel() and torch.backends.mkldnn.enabled:
        out_MN: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
        return out_MN
    return a_MK @ b_NK.T


class Blocked:
    """The tiles carry a column of ones beside the prototypes, and the features one beside theirs.

    So one product takes a sample's shift off its logits, and another gives the sum of exponentials with the pull:
    two passes less over a tile.
    """

    def scan(self, batch: HeadBatch) -> Scan:
        """First pass, see `Implementation`."""
        head, samples, dim = batch.head, *batch.unit_BD.shape
        maximum_B = batch.unit_BD.new_full((samples,), 0.0 if head.bounded else torch.finfo(batch.unit_BD.dtype).min)
        inverse_C1 = torch.empty_like(head.weight_CD[:, :1])
        scaled_BK = _beside(batch.unit_BD * head.margin.scale, torch.zeros_like(maximum_B))
        total_BK = torch.zeros_like(scaled_BK)
        for _, (sample_M, column_M), unit_TK in _tiles(batch, inverse_C1, measure=True):
            logits_BT = product(scaled_BK, unit_TK)
            logits_BT[sample_M, column_M] = -torch.inf
            if not head.bounded:
                higher_B = torch.maximum(maximum_B, logits_BT.amax(dim=1))
                logits_BT.sub_(higher_B[:, None])
                total_BK.mul_(torch.exp(maximum_B - higher_B)[:, None])
                maximum_B = higher_B
            total_BK.add_(product(logits_BT.exp_(), unit_TK.T))
        return Scan(maximum_B, total_BK[:, dim], total_BK[:, :dim], inverse_C1)

    def weight_gradient(
        self, batch: HeadBatch, scan: Scan, log_sum_exp_B: Tensor, weight_B: Tensor, sink: Sink
    ) -> None:
        """Second pass, see `Implementation`."""
        head, dim = batch.head, batch.unit_BD.shape[1]
        scaled_BD = batch.unit_BD * head.margin.scale
        shifted_BK = _beside(scaled_BD, -log_sum_exp_B)
        weighted_DB = (scaled_BD * weight_B[:, None]).T.contiguous()
        own_B = torch.zeros_like(weight_B).index_copy(
            0, batch.here_M, batch.own_error(log_sum_exp_B) / head.margin.scale
        )
        for first, (sample_M, column_M), unit_TK in _tiles(batch, scan.inverse_C1, measure=False):
            share_TB = product(unit_TK, shifted_BK).exp_()
            share_TB[column_M, sample_M] = own_B[sample_M]
            gradient_TD = product(share_TB, weighted_DB)
            inverse_T1 = scan.inverse_C1[first : first + len(unit_TK)]
            sink(first, through_unit_(gradient_TD, unit_TK[:, :dim], inverse_T1, head.margin))


def _beside(vectors_BD: Tensor, last_B: Tensor) -> Tensor:
    return torch.cat([vectors_BD, last_B[:, None]], dim=1)


def _tiles(batch: HeadBatch, inverse_C1: Tensor, measure: bool) -> Iterator[tuple[int, tuple[Tensor, Tensor], Tensor]]:
    """Tile after tile: its first prototype, the samples whose own prototype is in it with their places there, and the
    (T, D + 1) unit prototypes with their column of ones, in a buffer that the next tile takes over.

    `inverse_C1` holds what makes the prototypes unit ones, or is filled with it on the way.
    """
    weight_CD = batch.head.weight_CD
    rows, dim = weight_CD.shape
    step = tile_rows(len(batch.unit_BD))
    buffer_TK = weight_CD.new_ones(min(step, rows), dim + 1)
    sample_M = batch.here_M[torch.argsort(batch.column_B[batch.here_M])]
    column_M = batch.column_B[sample_M]
    edges = torch.searchsorted(column_M, torch.arange(0, rows + step, step, device=column_M.device)).tolist()
    for tile, first in enumerate(range(0, rows, step)):
        span, own = slice(first, first + step), slice(edges[tile], edges[tile + 1])
        if measure:
            inverse_C1[span] = inverse_length(weight_CD[span], batch.head.margin)
        unit_TK = buffer_TK[: min(step, rows - first)]
        torch.mul(weight_CD[span], inverse_C1[span], out=unit_TK[:, :dim])
        yield first, (sample_M[own], column_M[own] - first), unit_TK
