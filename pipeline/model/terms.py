"""The losses of a step over the gathered batch: what a rank says of each sample, and what all ranks make of it.

Every loss, whatever it compares, takes part in the same three collectives: its term reads the gathered batch, writes
its numbers a sample into the one exchange, and gives its share of the feature gradient to the one reduce-scatter.
`docs/compatibility.md` derives the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.model.heads import (
    MAXIMUM,
    NOT_HERE,
    OWN_LOGIT,
    STATISTICS,
    SUM_EXP,
    Approach,
    Distil,
    Head,
    HeadBatch,
    combine,
    feature_gradient,
    statistics,
    through_unit_,
)
from pipeline.model.implementations import Implementation


@dataclass(frozen=True)
class Gathered:
    """A batch as all ranks of a shard group hold it.

    Attributes:
        features_BD: of the new model, not normalised.
        labels_B: rows of the identity table; NOT_HERE where a rank's part was padded.
        guides_BE: the parents' features of the same images, side by side; (B, 0) if no loss asks for them.
        locals_BK: losses that each rank computed for its own samples.
        own: which samples are this rank's.
    """

    features_BD: Tensor
    labels_B: Tensor
    guides_BE: Tensor
    locals_BK: Tensor
    own: slice

    @property
    def real_B(self) -> Tensor:  # noqa: N802
        """(B,) bool: no padding."""
        return self.labels_B != NOT_HERE


class BatchLoss(Protocol):
    """A loss over the gathered batch that needs no prototypes, such as a contrast of new with old features."""

    @property
    def name(self) -> str:
        """Key of its figure."""

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        """(b,) losses of the anchors `own`; differentiable by `features_BD`, anchors and others alike.

        Padded samples have the label NOT_HERE: as anchors they do not count, as partners they must not.
        """


class Term(Protocol):
    """One loss in one step."""

    channels: int

    def statistics(self) -> Tensor:
        """(channels, B, STATISTICS): what this rank tells the others."""

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) losses and (B,) bool, which samples count: the same on every rank."""

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        """(B, d) this rank's share of the gradient of sum_b weight_b * loss_b by the first d feature values."""


class IdentityTerm:
    """Softmax towards the own identity's prototype: the new classifier's loss, and the influence loss."""

    channels = 1

    def __init__(self, head: Head, batch: Gathered, implementation: Implementation) -> None:
        self.batch = HeadBatch.of(head, batch.features_BD, batch.labels_B)
        self.scan = implementation.scan(self.batch)

    def statistics(self) -> Tensor:
        return statistics(self.batch, self.scan)[None]

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        self.log_sum_exp_B, own_B, known_B = combine(joined_WKBS[:, 0])
        return torch.where(known_B, self.log_sum_exp_B - own_B, 0.0), known_B

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        return feature_gradient(self.batch, self.scan, self.log_sum_exp_B, weight_B)


class DistilTerm:
    """Cross entropy between the parent's and the new model's softmax over the parent's prototypes.

    With p the parent's probabilities of a sample, sum_c p_c l_c = s u.(sum_c p_c w_c): the sums that the scan of the
    parent's own features makes are all that is needed, and each rank has its share of them.
    """

    channels = 2

    def __init__(self, head: Head, batch: Gathered, implementation: Implementation) -> None:
        assert isinstance(head.objective, Distil)
        self.objective, self.real_B = head.objective, batch.real_B
        self.known_B = head.columns_of(batch.labels_B) != NOT_HERE
        nobody_B = torch.full_like(batch.labels_B, NOT_HERE)  # every prototype is scored alike
        guides_BE = batch.guides_BE[:, self.objective.guide]
        self.new = HeadBatch.of(head, batch.features_BD, nobody_B)
        self.old = HeadBatch.of(head, guides_BE, nobody_B)
        self.new_scan, self.old_scan = implementation.scan(self.new), implementation.scan(self.old)

    def statistics(self) -> Tensor:
        new_BS = statistics(self.new, self.new_scan)
        new_BS[:, OWN_LOGIT] = torch.where(self.known_B, 0.0, -torch.inf).to(new_BS.dtype)
        old_BS = statistics(self.old, self.old_scan)
        pulled_B = torch.linalg.vecdot(self.new.unit_BD, self.old_scan.pull_BD)
        old_BS[:, OWN_LOGIT] = pulled_B * self.new.head.margin.scale
        return torch.stack([new_BS, old_BS])

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        new_WBS, old_WBS = joined_WKBS[:, 0].clone(), joined_WKBS[:, 1].clone()
        known_B = new_WBS[..., OWN_LOGIT].amax(dim=0) != -torch.inf
        pulled_WB = old_WBS[..., OWN_LOGIT].clone()
        new_WBS[..., OWN_LOGIT] = old_WBS[..., OWN_LOGIT] = -torch.inf
        self.new_log_B, self.old_log_B = combine(new_WBS)[0], combine(old_WBS)[0]
        target_B = (pulled_WB * torch.exp(old_WBS[..., MAXIMUM] - self.old_log_B)).sum(dim=0)
        counted_B = self.real_B & ~known_B if self.objective.unknown_only else self.real_B
        nothing_B = old_WBS[..., SUM_EXP].sum(dim=0) == 0  # no prototype was sampled: there is no choice to agree on
        return torch.where(counted_B & ~nothing_B, self.new_log_B - target_B, 0.0), counted_B

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        towards_BD = self.new_scan.pull_BD * torch.exp(self.new_scan.maximum_B - self.new_log_B)[:, None]
        towards_BD -= self.old_scan.pull_BD * torch.exp(self.old_scan.maximum_B - self.old_log_B)[:, None]
        towards_BD *= (weight_B * self.new.head.margin.scale)[:, None]
        return through_unit_(towards_BD, self.new.unit_BD, self.new.inverse_B1, self.new.head.margin)


class ApproachTerm:
    """A penalty on the distance to the own identity's old prototype: no softmax, no other prototype."""

    channels = 1

    def __init__(self, head: Head, batch: Gathered, _: Implementation) -> None:
        assert isinstance(head.objective, Approach)
        bare = replace(head, margin=head.margin.model_copy(update={"name": "norm_softmax", "scale": 1.0}))
        self.batch = HeadBatch.of(bare, batch.features_BD, batch.labels_B)
        cosine_M = (self.batch.unit_BD[self.batch.here_M] * self.batch.own_MD).sum(dim=1)
        radius_M = head.objective.radius_C[self.batch.column_B[self.batch.here_M]]
        with torch.enable_grad():
            cosine_M = cosine_M.detach().requires_grad_()
            penalty_M = head.objective.penalty(cosine_M, radius_M)
            (self.slope_M,) = torch.autograd.grad(penalty_M.sum(), cosine_M)
        self.penalty_M = penalty_M.detach()

    def statistics(self) -> Tensor:
        return _told(self.batch.unit_BD[:, 0], self.batch.here_M, self.penalty_M)

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        return _heard(joined_WKBS)

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        gradient_BD = torch.zeros_like(self.batch.unit_BD)
        pull_M1 = (self.slope_M * weight_B[self.batch.here_M])[:, None]
        gradient_BD.index_add_(0, self.batch.here_M, self.batch.own_MD * pull_M1)
        return through_unit_(gradient_BD, self.batch.unit_BD, self.batch.inverse_B1, self.batch.head.margin)


class BatchTerm:
    """A `BatchLoss`: each rank scores its own samples as anchors, against all."""

    channels = 1

    def __init__(self, loss: BatchLoss, batch: Gathered) -> None:
        own_b = torch.arange(len(batch.labels_B), device=batch.labels_B.device)[batch.own]
        with torch.enable_grad():
            features_BD = batch.features_BD.detach().requires_grad_()
            loss_b = loss(features_BD, batch.guides_BE, batch.labels_B, batch.own)
            assert loss_b.shape == own_b.shape, f"{loss.name}: one loss an anchor"
        self.features_BD, self.loss_b, self.own_b = features_BD, loss_b, own_b

    def statistics(self) -> Tensor:
        return _told(self.features_BD[:, 0].detach(), self.own_b, self.loss_b.detach())

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        return _heard(joined_WKBS)

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        (gradient_BD,) = torch.autograd.grad(self.loss_b, self.features_BD, weight_B[self.own_b])
        return gradient_BD


class LocalTerm:
    """A loss that each rank computed for its own samples, with a graph of its own: only its mean is made here."""

    channels = 1

    def __init__(self, number: int, batch: Gathered) -> None:
        self.loss_B, self.real_B = batch.locals_BK[:, number], batch.real_B

    def statistics(self) -> Tensor:
        nothing_S = self.loss_B.new_full((STATISTICS,), -torch.inf)
        return nothing_S.expand(1, len(self.loss_B), STATISTICS)

    def losses(self, joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
        assert joined_WKBS.shape[2] == len(self.loss_B)
        return torch.where(self.real_B, self.loss_B, 0.0), self.real_B

    def feature_gradient(self, weight_B: Tensor) -> Tensor:
        return weight_B.new_zeros(len(weight_B), 0)


TERMS: dict[type, Callable[[Head, Gathered, Implementation], Term]] = {
    Distil: DistilTerm,
    Approach: ApproachTerm,
}


def term_of(head: Head, batch: Gathered, implementation: Implementation) -> Term:
    """The loss of a head."""
    return TERMS.get(type(head.objective), IdentityTerm)(head, batch, implementation)


def _told(like_B: Tensor, samples_M: Tensor, loss_M: Tensor) -> Tensor:
    """(1, B, STATISTICS): the losses of some samples, which no other rank tells of."""
    told_BS = like_B.new_full((len(like_B), STATISTICS), -torch.inf)
    told_BS[samples_M, OWN_LOGIT] = loss_M
    return told_BS[None]


def _heard(joined_WKBS: Tensor) -> tuple[Tensor, Tensor]:
    """What `_told` tells, of all ranks. A NaN stays one."""
    loss_B = joined_WKBS[:, 0, :, OWN_LOGIT].amax(dim=0)
    told_B = loss_B != -torch.inf
    return torch.where(told_B, loss_B, 0.0), told_B
