"""Contrasts of new features with old ones, over the gathered batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.model.heads import NOT_HERE
from pipeline.model.terms import BatchLoss


class _Contrast(Method):
    asks_features = True
    compares_samples = True
    temperature: float = Field(0.05, gt=0, description="divides the cosines")


class Ract(_Contrast):
    """A new feature is to lie nearer to its image's old feature than to others' features, old and new.

    Source: Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image
    Retrieval", ICLR 2022, the regression-alleviating compatibility loss. `negatives: old` is the backward-compatible
    contrast that the paper starts from. Theirs: one positive, the image's own old feature; features of its identity
    are no negatives. Ours: partners learn as well as anchors, where the paper's are constants on other GPUs; a larger
    new dimension meets old features by its leading values, and new ones in full.
    """

    method: Literal["ract"] = "ract"
    negatives: Literal["old and new", "old"] = Field("old and new", description="features of other identities")

    def batch_losses(self, parent: Parent) -> list[BatchLoss]:
        """One: the contrast."""
        return [Contrast(parent.name, parent.guide, self.temperature, self.negatives == "old and new")]


class Nccl(_Contrast):
    """A new feature is to lie near all old features of its identity, the more so the nearer they lie to its own.

    Source: Wu et al., "Neighborhood Consensus Contrastive Learning for Backward-Compatible Representation", AAAI
    2022, the soft contrast in embedding space: a positive counts by (1 + cosine of the two old features) / 2. Left
    out: the same contrast on the vectors of class probabilities, which no rank holds, and the filter of images by the
    entropy of those. Ours: the gathered batch stands for the paper's queue of old features.
    """

    method: Literal["nccl"] = "nccl"

    def batch_losses(self, parent: Parent) -> list[BatchLoss]:
        """One: the contrast."""
        return [Neighbourhood(parent.name, parent.guide, self.temperature)]


@dataclass(frozen=True)
class Contrast:
    """With n and o the unit features of anchor i, t the temperature and j over the other identities' samples,

    -log exp(n_i.o_i / t) / (exp(n_i.o_i / t) + sum_j exp(n_i.o_j / t) + sum_j exp(n_i.n_j / t)).
    """

    name: str
    guide: slice
    temperature: float
    new_negatives: bool

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        """See `BatchLoss`."""
        old_BD = F.normalize(guides_BE[:, self.guide])
        to_old_bB = F.normalize(features_BD[own, : old_BD.shape[1]]) @ old_BD.T / self.temperature
        own_logit_b = to_old_bB.diagonal(own.start or 0)
        no_negative_bB = (labels_B[own, None] == labels_B) | (labels_B == NOT_HERE)
        logits = [own_logit_b[:, None], to_old_bB.masked_fill(no_negative_bB, -torch.inf)]
        if self.new_negatives:
            unit_BD = F.normalize(features_BD)
            to_new_bB = unit_BD[own] @ unit_BD.T / self.temperature
            logits.append(to_new_bB.masked_fill(no_negative_bB, -torch.inf))
        return torch.logsumexp(torch.cat(logits, dim=1), dim=1) - own_logit_b


@dataclass(frozen=True)
class Neighbourhood:
    """With P the samples of anchor i's identity, itself included, and w_ij = (1 + o_i.o_j) / 2,

    -1 / |P| sum over j in P of w_ij log softmax_j(n_i.o_j / t), the softmax over all samples' old features.
    """

    name: str
    guide: slice
    temperature: float

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        """See `BatchLoss`."""
        old_BD = F.normalize(guides_BE[:, self.guide])
        logits_bB = F.normalize(features_BD[own, : old_BD.shape[1]]) @ old_BD.T / self.temperature
        logits_bB = logits_bB.masked_fill(labels_B == NOT_HERE, torch.finfo(logits_bB.dtype).min)
        same_bB = labels_B[own, None] == labels_B
        weight_bB = same_bB * (1 + old_BD[own] @ old_BD.T) / (2 * same_bB.sum(dim=1, keepdim=True))
        return -(weight_bB * logits_bB.log_softmax(dim=1)).sum(dim=1)
