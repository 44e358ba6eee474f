"""The classifier as public code computes it: normalised prototypes and all logits written out, gradients by autograd.

The alternative that the benchmark runs beside ours; the steps are those of InsightFace's arcface_torch (Partial FC),
without its distributed parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.margins import MarginConfig
from pipeline.model.sampling import sampled

RATE, MOMENTUM = 0.1, 0.9


class EagerClassifier:
    """One process, SGD with momentum, CosFace."""

    def __init__(
        self,
        weight_CD: Tensor,
        momentum_CD: Tensor,
        margin: MarginConfig,
        parents: Sequence[Tensor],
        sample_rate: float,
    ) -> None:
        self.weight_CD, self.momentum_CD, self.margin = weight_CD, momentum_CD, margin
        self.parents, self.sample_rate = parents, sample_rate

    def forward(self, features_BD: Tensor, labels_B: Tensor, step: int) -> Tensor:
        """Sum of the heads' losses."""
        self.columns_K: Tensor | None = None
        places_B, active_KD = labels_B, self.weight_CD
        if self.sample_rate < 1:
            chosen_C = sampled(range(len(active_KD)), self.sample_rate, 0, step, active_KD.device)
            chosen_C[labels_B] = True
            self.columns_K = torch.nonzero(chosen_C).flatten()
            places_B, active_KD = torch.searchsorted(self.columns_K, labels_B), active_KD[self.columns_K]
        self.active_KD = active_KD.detach().requires_grad_()
        loss = self._loss(features_BD, self.active_KD, places_B)
        for parent_CD in self.parents:
            loss = loss + self._loss(features_BD, parent_CD, labels_B % len(parent_CD))
        return loss

    def update(self) -> None:
        """SGD on the prototypes that took part."""
        momentum_KD = self.momentum_CD if self.columns_K is None else self.momentum_CD[self.columns_K]
        optimiser = torch.optim.SGD([self.active_KD], lr=RATE, momentum=MOMENTUM)
        optimiser.state[self.active_KD]["momentum_buffer"] = momentum_KD
        optimiser.step()
        if self.columns_K is not None:
            self.weight_CD[self.columns_K] = self.active_KD.detach()
            self.momentum_CD[self.columns_K] = momentum_KD
        del self.active_KD

    def _loss(self, features_BD: Tensor, weight_CD: Tensor, labels_B: Tensor) -> Tensor:
        logits_BC = F.linear(F.normalize(features_BD), F.normalize(weight_CD))
        logits_BC[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= self.margin.m3
        return F.cross_entropy(logits_BC * self.margin.scale, labels_B)
