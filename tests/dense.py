"""Plain references: the mathematics as the papers write it, dense, single-process, by autograd."""

from __future__ import annotations

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
