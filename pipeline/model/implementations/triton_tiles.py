"""Tiles of prototypes on a GPU: Triton makes the scores with the softmax in their epilogue, cuBLAS the two sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.heads import HeadBatch, Scan
from pipeline.model.implementations import Sink, kernels

TILE_BYTES = 64 << 20  # of a tile's scores, at most
TILE_ROWS = 16384  # at most


@dataclass(frozen=True)
class TritonTiles:
    """Unit prototypes, scores and the features they meet in `precision`; statistics, sums and rows in float32."""

    precision: torch.dtype

    def scan(self, batch: HeadBatch) -> Scan:
        """First pass, see `Implementation`."""
        maximum_B = torch.zeros_like(batch.inverse_B1[:, 0]) if batch.head.bounded else self._maximum(batch)
        tiles = _Tiles(batch, self.precision)
        sum_B, pull_BD = torch.zeros_like(maximum_B), torch.zeros_like(batch.unit_BD)
        for first in tiles:
            sum_B += tiles.score(kernels.SUM, first, maximum_B).sum(dim=0)
            pull_BD += _sum_of_products(tiles.scores_BT, tiles.unit_TD)
        return Scan(maximum_B, sum_B, pull_BD, tiles.inverse_C1)

    def weight_gradient(
        self, batch: HeadBatch, scan: Scan, log_sum_exp_B: Tensor, weight_B: Tensor, sink: Sink
    ) -> None:
        """Second pass, see `Implementation`."""
        margin, weight_CD = batch.head.margin, batch.head.weight_CD
        own_M = batch.own_error(log_sum_exp_B) / margin.scale
        own_B = torch.zeros_like(weight_B).index_copy(0, batch.here_M, own_M)
        weighted_BD = (batch.unit_BD * (weight_B * margin.scale)[:, None]).to(self.precision)
        tiles = _Tiles(batch, self.precision)
        for first in tiles:
            tiles.score(kernels.ERROR, first, log_sum_exp_B, own_B)
            gradient_TD = _sum_of_products(tiles.scores_BT.T, weighted_BD)
            if margin.normalised:
                span = slice(first, first + len(gradient_TD))
                kernels.through_unit(gradient_TD, weight_CD[span], scan.inverse_C1[span])
            sink(first, gradient_TD)

    def _maximum(self, batch: HeadBatch) -> Tensor:
        """(B,) largest logits: a pass of its own, for heads whose exponentials could overflow."""
        tiles = _Tiles(batch, self.precision)
        maximum_B = torch.full_like(batch.inverse_B1[:, 0], torch.finfo(torch.float32).min)
        for first in tiles:
            maximum_B = torch.maximum(maximum_B, tiles.score(kernels.MAXIMUM, first, maximum_B).amax(dim=0))
        return maximum_B


class _Tiles:
    """The tiles of a head for a batch, in buffers that each takes over from the one before.

    Attributes:
        unit_TD: unit prototypes of the current tile.
        scores_BT: what `score` made of it.
        inverse_C1: one over the prototypes' lengths, of the tiles so far.
    """

    def __init__(self, batch: HeadBatch, precision: torch.dtype) -> None:
        self.batch = batch
        self.features_BD = batch.unit_BD.to(precision).contiguous()
        (samples, dim), rows = self.features_BD.shape, len(batch.head.weight_CD)
        fitting = TILE_BYTES // (precision.itemsize * max(samples, 1))
        self.step = max(1, min(TILE_ROWS, max(1024, fitting), rows))
        self._unit = self.features_BD.new_empty(self.step, dim)
        self._scores = self.features_BD.new_empty(samples * self.step)
        self.inverse_C1 = batch.head.weight_CD.new_empty(rows, 1)

    def __iter__(self) -> Iterator[int]:
        weight_CD, normalised = self.batch.head.weight_CD, self.batch.head.margin.normalised
        for first in range(0, len(weight_CD), self.step):
            weight_TD = weight_CD[first : first + self.step]
            samples, rows = len(self.features_BD), len(weight_TD)
            self.unit_TD = self._unit[:rows]
            self.scores_BT = self._scores[: samples * rows].view(samples, rows)
            kernels.unit_rows(weight_TD, normalised, self.unit_TD, self.inverse_C1[first : first + rows])
            yield first

    def score(self, mode: kernels.Mode, first: int, shift_B: Tensor, own_value_B: Tensor | None = None) -> Tensor:
        """Run the scores' kernel on the current tile; see `kernels.scores`."""
        return kernels.scores(
            mode,
            self.features_BD,
            self.unit_TD,
            shift_B,
            self.batch.column_B,
            shift_B if own_value_B is None else own_value_B,
            self.scores_BT,
            first,
            self.batch.head.margin.scale,
        )


def _sum_of_products(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """(M, N) float32 = a @ b, whatever the precision of the factors."""
    if a_MK.dtype == torch.float32:
        return a_MK @ b_KN
    if a_MK.device.type == "cpu":  # in the interpreter: exact products of the rounded factors, as a GPU sums them
        return a_MK.float() @ b_KN.float()
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
