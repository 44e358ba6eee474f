"""Adversarial learning between old and new features, and an elastic boundary around the old class centres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat.base import Companion, Method, Parent
from pipeline.compat.methods.lce import boundary_head
from pipeline.model.gradients import scale_gradient
from pipeline.model.heads import Head


class AdvBct(Method):
    """New features that a discriminator cannot tell from old ones, within an elastic boundary of their identity.

    Source: Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning in Image
    Retrieval", CVPR 2023. Theirs: a discriminator of one hidden layer, the gradient of the new features reversed; the
    loss max(0, |feature - centre| - radius) over identities of more than one image, where the radius lies between
    that of the furthest old feature and `threshold`. Theirs learns for each identity how far it lies between the two;
    ours is the constant `elasticity`, since that loss only ever asks for the larger radius. Theirs raises the
    reversal and lowers the discriminator's weight over the epochs: here `warmup` and `weight_end` do so for all
    losses. Ours: features of length 1, as they are searched, and layer norm, for which a rank's batch may be small.
    """

    method: Literal["advbct"] = "advbct"
    asks_features = True
    reversal: float = Field(1.0, ge=0, description="factor on the reversed gradient of the new features")
    hidden: int = Field(100, ge=1, description="width of the discriminator")
    threshold: float = Field(0.5, gt=0, lt=2, description="distance of unit vectors that all radii are drawn to")
    elasticity: float = Field(0.5, ge=0, le=1, description="share of the way from the furthest feature's to there")

    @property
    def asks_means(self) -> bool:
        """They are the centres."""
        return True

    @property
    def asks_spread(self) -> float | None:
        """The furthest image's."""
        return 1.0

    def heads(self, parent: Parent) -> list[Head]:
        """One: the boundary."""
        assert parent.spread_C is not None, "the method asks for the spread"
        furthest_C = chord(parent.spread_C)
        radius_C = torch.lerp(furthest_C, torch.full_like(furthest_C, self.threshold), self.elasticity)
        return [boundary_head(parent, torch.where(parent.spread_C < 1 - 1e-6, radius_C, 0.0), beyond)]

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """The discriminators."""
        del dim
        return Discriminators(parents, self.hidden, self.reversal) if parents else None


class Discriminators(Companion):
    """One a parent; the features pass unchanged.

    With d the logit of "old", softplus(d(new)) + softplus(-d(old)) is a sample's loss: the negative log likelihood of
    both origins.
    """

    def __init__(self, parents: Sequence[Parent], hidden: int, reversal: float) -> None:
        super().__init__()
        self.losses = tuple(f"{parent.name}/adversarial" for parent in parents)
        self.guides, self.reversal = [parent.guide for parent in parents], reversal
        self.judges = nn.ModuleList(
            nn.Sequential(
                nn.Linear(guide.stop - guide.start, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 1)
            )
            for guide in self.guides
        )

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Companion`."""
        del labels_b
        losses = []
        for judge, guide in zip(self.judges, self.guides, strict=True):
            old_bD = F.normalize(guides_bE[:, guide])
            new_bD = F.normalize(features_bD[:, : old_bD.shape[1]])
            new_bD = scale_gradient(new_bD, -self.reversal)
            losses.append(F.softplus(judge(new_bD)) + F.softplus(-judge(old_bD)))
        return features_bD, torch.cat(losses, dim=1)


def chord(cosine_M: Tensor) -> Tensor:
    """(M,) distance of unit vectors from their cosine; its derivative stays finite at 0."""
    return (2 - 2 * cosine_M).clamp_min(1e-12).sqrt()


def beyond(cosine_M: Tensor, radius_M: Tensor) -> Tensor:
    """(M,) how far outside the radius."""
    return (chord(cosine_M) - radius_M).clamp_min(0)
