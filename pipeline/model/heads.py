"""One classifier head on one rank: its prototypes, and its part of the softmax, tile by tile.

A head never sees the whole table. It scores the gathered batch against the prototypes that this rank holds,
`TILE_ROWS` at a time, and keeps three numbers a sample; in backward the same tiles are computed again. The
B x C logits exist nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.margins import MarginConfig, apply_margin

TILE_ROWS = 8192
NOT_HERE = -1  # column of a sample whose own prototype is on another rank, or nowhere
TINY = 1e-12  # smallest length that is divided by

# Columns of a head's statistics: running maximum, sum of exponentials below it, logit of the own identity.
MAXIMUM, SUM_EXP, OWN_LOGIT = range(3)
STATISTICS = 3


@dataclass(frozen=True)
class Head:
    """The prototypes of one classifier that this rank holds.

    Attributes:
        name: of the generation; the key of its loss.
        weight_CD: (C, D) this rank's prototypes. Those of a parent need no gradient.
        rows_C: (C,) int64, ascending: the row of each prototype in the new identity table. A parent's identity
            that is gone has a row past the table's end, so that no label finds it and it stays a negative.
        margin: normalisation, scale and margin of this classifier's own convention.
    """

    name: str
    weight_CD: Tensor
    rows_C: Tensor
    margin: MarginConfig

    def columns_of(self, labels_B: Tensor) -> Tensor:
        """(B,) place of each label's prototype in `weight_CD`, NOT_HERE where this rank has none."""
        if not len(self.rows_C):
            return torch.full_like(labels_B, NOT_HERE)
        column_B = torch.searchsorted(self.rows_C, labels_B).clamp_max(len(self.rows_C) - 1)
        return torch.where(self.rows_C[column_B] == labels_B, column_B, NOT_HERE)


def unit(vectors_ND: Tensor, margin: MarginConfig) -> tuple[Tensor, Tensor]:
    """Vectors as the head's convention takes them, and one over their length (1 where they stay as they are)."""
    if not margin.normalised:
        return vectors_ND, vectors_ND.new_ones(len(vectors_ND), 1)
    inverse_N1 = vectors_ND.norm(dim=1, keepdim=True).clamp_min(TINY).reciprocal()
    return vectors_ND * inverse_N1, inverse_N1


def through_unit(gradient_ND: Tensor, unit_ND: Tensor, inverse_N1: Tensor, margin: MarginConfig) -> Tensor:
    """Gradient with respect to the vectors, from that with respect to the vectors as `unit` gave them."""
    if not margin.normalised:
        return gradient_ND
    along_N1 = (gradient_ND * unit_ND).sum(dim=1, keepdim=True)
    return (gradient_ND - unit_ND * along_N1) * inverse_N1


@dataclass(frozen=True)
class HeadBatch:
    """The gathered batch as one head sees it.

    A larger new dimension is compared by its leading slice, renormalised (Shen et al. 2020, section 3.4).
    """

    head: Head
    features_BD: Tensor  # as the head's convention takes them
    inverse_B1: Tensor  # one over their length
    column_B: Tensor
    own_logit_B: Tensor  # minus infinity where the own prototype is not here
    own_slope_B: Tensor  # d own logit / d cosine

    @classmethod
    def of(cls, head: Head, features_BD: Tensor, labels_B: Tensor) -> HeadBatch:
        """Find the samples whose own prototype is here and score them with the margin."""
        unit_BD, inverse_B1 = unit(features_BD[:, : head.weight_CD.shape[1]], head.margin)
        column_B = head.columns_of(labels_B)
        here_M = torch.nonzero(column_B != NOT_HERE).flatten()
        own_MD, _ = unit(head.weight_CD[column_B[here_M]], head.margin)
        logit_M, slope_M = apply_margin((unit_BD[here_M] * own_MD).sum(dim=1), head.margin)
        logit_B = unit_BD.new_full((len(unit_BD),), -torch.inf).index_copy(0, here_M, logit_M)
        slope_B = unit_BD.new_zeros(len(unit_BD)).index_copy(0, here_M, slope_M)
        return cls(head, unit_BD, inverse_B1, column_B, logit_B, slope_B)

    def tiles(self) -> range:
        """First column of each tile."""
        return range(0, len(self.head.weight_CD), TILE_ROWS)

    def own_in_tile(self, first: int) -> tuple[Tensor, Tensor]:
        """Samples whose own prototype is in the tile, and their columns within it."""
        sample_M = torch.nonzero((self.column_B >= first) & (self.column_B < first + TILE_ROWS)).flatten()
        return sample_M, self.column_B[sample_M] - first

    def tile_logits(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) logits of a tile with the margin in place, its (T, D) unit prototypes and their inverse lengths."""
        unit_TD, inverse_T1 = unit(self.head.weight_CD[first : first + TILE_ROWS], self.head.margin)
        logits_BT = (self.features_BD @ unit_TD.T).mul_(self.head.margin.scale)
        sample_M, column_M = self.own_in_tile(first)
        logits_BT[sample_M, column_M] = self.own_logit_B[sample_M]
        return logits_BT, unit_TD, inverse_T1


def statistics(batch: HeadBatch) -> Tensor:
    """(B, STATISTICS) of this rank's prototypes, by an online softmax over its tiles."""
    maximum_B = batch.features_BD.new_full((len(batch.features_BD),), -torch.inf)
    sum_B = torch.zeros_like(maximum_B)
    for first in batch.tiles():
        logits_BT, _, _ = batch.tile_logits(first)
        higher_B = torch.maximum(maximum_B, logits_BT.amax(dim=1))
        sum_B = sum_B * torch.exp(maximum_B - higher_B) + torch.exp(logits_BT - higher_B[:, None]).sum(dim=1)
        maximum_B = higher_B
    return torch.stack([maximum_B, sum_B, batch.own_logit_B], dim=1)


def combine(statistics_WBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the statistics of all ranks.

    Returns:
        (B,) log-sum-exp over the whole classifier, (B,) logit of the own identity, and (B,) bool, whether the
        identity has a prototype in this classifier at all. A NaN stays one: it must not pass for "no prototype".
    """
    maximum_B = statistics_WBS[..., MAXIMUM].amax(dim=0)
    sum_B = (statistics_WBS[..., SUM_EXP] * torch.exp(statistics_WBS[..., MAXIMUM] - maximum_B)).sum(dim=0)
    own_B = statistics_WBS[..., OWN_LOGIT].amax(dim=0)
    return maximum_B + torch.log(sum_B), own_B, own_B != -torch.inf


def gradients(batch: HeadBatch, log_sum_exp_B: Tensor, weight_of_sample_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of sum_b weight_b * (log_sum_exp_b - own_logit_b) by this rank's prototypes.

    Returns:
        (B, D_head) this rank's share of the feature gradient, to be summed over ranks, and the (C, D_head)
        gradient of its own prototypes, None for a frozen head.
    """
    head = batch.head
    feature_gradient_BD = torch.zeros_like(batch.features_BD)
    weight_gradient_CD = torch.empty_like(head.weight_CD) if head.weight_CD.requires_grad else None
    for first in batch.tiles():
        logits_BT, unit_TD, inverse_T1 = batch.tile_logits(first)
        share_BT = torch.exp(logits_BT.sub_(log_sum_exp_B[:, None])).mul_(weight_of_sample_B[:, None])
        sample_M, column_M = batch.own_in_tile(first)
        own_M = (share_BT[sample_M, column_M] - weight_of_sample_B[sample_M]) * batch.own_slope_B[sample_M]
        gradient_BT = share_BT.mul_(head.margin.scale)
        gradient_BT[sample_M, column_M] = own_M
        feature_gradient_BD.addmm_(gradient_BT, unit_TD)
        if weight_gradient_CD is not None:
            tile_TD = gradient_BT.T @ batch.features_BD
            weight_gradient_CD[first : first + TILE_ROWS] = through_unit(tile_TD, unit_TD, inverse_T1, head.margin)
    return through_unit(feature_gradient_BD, batch.features_BD, batch.inverse_B1, head.margin), weight_gradient_CD
