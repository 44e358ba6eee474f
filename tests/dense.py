"""Plain references: the mathematics as the papers write it, dense, single-process, by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.margins import MarginConfig


def dense_logits(features_BD: Tensor, weight_CD: Tensor, labels_B: Tensor, margin: MarginConfig) -> Tensor:
    """(B, C) logits. Rows with label -1 have no own identity and get no margin."""
    if margin.name == "softmax":
        return features_BD @ weight_CD.T
    cosine_BC = F.normalize(features_BD) @ F.normalize(weight_CD).T
    own_BC = F.one_hot(labels_B.clamp_min(0), len(weight_CD)).bool() & (labels_B >= 0)[:, None]
    if margin.m1 == 1 and margin.m2 == 0:
        with_margin_BC = cosine_BC - margin.m3
    else:
        with_margin_BC = torch.cos(margin.m1 * torch.acos(cosine_BC) + margin.m2) - margin.m3
    return margin.scale * torch.where(own_BC, with_margin_BC, cosine_BC)


def dense_loss(features_BD: Tensor, weight_CD: Tensor, labels_B: Tensor, margin: MarginConfig) -> Tensor:
    """Mean cross entropy over the samples that have a label (>= 0); 0 if none has."""
    has = labels_B >= 0
    if not has.any():
        return features_BD.sum() * 0
    logits_BC = dense_logits(features_BD, weight_CD, labels_B, margin)
    return F.cross_entropy(logits_BC[has], labels_B[has])


def influence_loss(
    features_BD: Tensor, old_weight_CD: Tensor, old_labels_B: Tensor, margin: MarginConfig, old_dim: int
) -> Tensor:
    """Shen et al. 2020, Eq. 8, second term: the old classifier's loss on the new features of T_old."""
    return dense_loss(features_BD[:, :old_dim], old_weight_CD, old_labels_B, margin)


def old_logits(features_BD: Tensor, old_weight_KE: Tensor, margin: MarginConfig) -> Tensor:
    """(B, K) logits of the leading feature values under the parent's convention, without a margin."""
    features_BE = features_BD[:, : old_weight_KE.shape[1]]
    if margin.normalised:
        features_BE, old_weight_KE = F.normalize(features_BE), F.normalize(old_weight_KE)
    return margin.scale * features_BE @ old_weight_KE.T


def distilled_loss(
    features_BD: Tensor, guides_BE: Tensor, old_weight_KE: Tensor, counted_B: Tensor, margin: MarginConfig
) -> Tensor:
    """Shen et al. 2020, section 3.3; Li and Hoiem 2016, Eq. 2: cross entropy to the parent's own probabilities.

    Mean over the samples that count; 0 if none does, or if there is nothing to choose from.
    """
    if not counted_B.any() or not len(old_weight_KE):
        return features_BD.sum() * 0
    target_BK = torch.softmax(old_logits(guides_BE, old_weight_KE, margin), dim=1)
    log_BK = torch.log_softmax(old_logits(features_BD, old_weight_KE, margin), dim=1)
    return -(target_BK * log_BK).sum(dim=1)[counted_B].mean()


def approach_loss(
    features_BD: Tensor,
    old_weight_KE: Tensor,
    radius_K: Tensor,
    columns_B: Tensor,
    penalty: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Mean penalty on the cosine to the own old prototype, of the samples that have one (column >= 0)."""
    has = columns_B >= 0
    if not has.any():
        return features_BD.sum() * 0
    old_ME = old_weight_KE[columns_B[has]]
    cosine_M = F.cosine_similarity(features_BD[has, : old_ME.shape[1]], old_ME)
    return penalty(cosine_M, radius_K[columns_B[has]]).mean()


def regression_loss(features_BD: Tensor, guides_BE: Tensor) -> Tensor:
    """Mean squared distance of unit features, by the leading values of a larger dimension."""
    return (F.normalize(features_BD[:, : guides_BE.shape[1]]) - F.normalize(guides_BE)).square().sum(dim=1).mean()


def contrast_loss(features_BD: Tensor, guides_BD: Tensor, scale: float, blocks: list[list[int]]) -> Tensor:
    """Mean over samples of the cross entropy of the own old feature among all old and all other new ones of a block."""
    new_BD, old_BD = F.normalize(features_BD), F.normalize(guides_BD)
    losses = []
    for block in blocks:
        for anchor in block:
            others = [new_BD[other] for other in block if other != anchor]
            partners_ND = torch.stack([old_BD[anchor], *(old_BD[other] for other in block if other != anchor), *others])
            losses.append(F.cross_entropy(scale * partners_ND @ new_BD[anchor], torch.tensor(0)))
    return torch.stack(losses).mean()
