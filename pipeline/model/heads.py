"""One classifier head on one rank: its prototypes, a batch as it sees it, and what the ranks join.

With u_b the unit feature, w_c the unit prototype, s the scale and y the sample's own identity, the logits are
l_bc = s u_b.w_c for c != y and l_by = margin(u_b.w_y). The own identity is scored apart, so that what runs over
millions of prototypes knows no margin. `docs/classifier.md` derives the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.model.margins import MarginConfig, apply_margin

NOT_HERE = -1  # column of a sample whose own prototype is on another rank, or nowhere
TINY = 1e-12  # smallest length that is divided by
# Cosines times a scale up to this one need no running maximum: exp(64) times a billion prototypes is a float32.
SAFE_SCALE = 64.0

# What ranks exchange of a sample: maximum of its logits, sum of exponentials below it, logit of the own identity.
MAXIMUM, SUM_EXP, OWN_LOGIT = range(3)
STATISTICS = 3


@dataclass(frozen=True)
class Identify:
    """Softmax towards the own identity's prototype, over the samples whose identity has one."""

    def only(self, _: Tensor) -> Identify:
        """For some of the prototypes."""
        return self


@dataclass(frozen=True)
class Distil:
    """Softmax towards the parent's own probabilities.

    Attributes:
        guide: columns of the parent's features among those that are gathered.
        unknown_only: over the samples whose identity has no prototype here, not over all.
    """

    guide: slice
    unknown_only: bool

    def only(self, _: Tensor) -> Distil:
        """For some of the prototypes."""
        return self


@dataclass(frozen=True)
class Approach:
    """A penalty on the cosine to the own identity's prototype.

    Attributes:
        radius_C: (C,) how far from its prototype the parent's features of each identity lie.
        penalty: (M,) cosines and (M,) radii to (M,) losses, differentiable by the cosines.
    """

    radius_C: Tensor
    penalty: Callable[[Tensor, Tensor], Tensor]

    def only(self, columns_K: Tensor) -> Approach:
        """For some of the prototypes."""
        return replace(self, radius_C=self.radius_C[columns_K])


@dataclass(frozen=True)
class Follow:
    """Softmax towards the own identity's prototype, which follows the parent (`pipeline/model/followers.py`).

    Attributes:
        guide: columns of the parent's features among those that are gathered.
    """

    guide: slice

    def only(self, _: Tensor) -> Follow:
        """For some of the prototypes."""
        return self


Objective = Identify | Distil | Approach | Follow


@dataclass(frozen=True)
class Head:
    """The prototypes of one classifier that this rank holds, and what a sample's features are to do with them.

    Attributes:
        name: of the generation; the key of its loss.
        weight_CD: (C, D) this rank's prototypes.
        rows_C: C ascending rows of the new identity table, one a prototype: a range, or (C,) int64. A parent's
            identity that is gone has a row past the table's end, so that no label finds it and it stays a negative.
        margin: normalisation, scale and margin of this classifier's own convention.
    """

    name: str
    weight_CD: Tensor
    rows_C: Tensor | range
    margin: MarginConfig
    objective: Objective = Identify()

    def columns_of(self, labels_B: Tensor) -> Tensor:
        """(B,) place of each label's prototype in `weight_CD`, NOT_HERE where this rank has none."""
        if not len(self.rows_C):
            return torch.full_like(labels_B, NOT_HERE)
        if isinstance(self.rows_C, range):
            column_B = labels_B - self.rows_C.start
            return torch.where((column_B >= 0) & (column_B < len(self.rows_C)), column_B, NOT_HERE)
        column_B = torch.searchsorted(self.rows_C, labels_B).clamp_max(len(self.rows_C) - 1)
        return torch.where(self.rows_C[column_B] == labels_B, column_B, NOT_HERE)

    def only(self, columns_K: Tensor) -> Head:
        """The head with a copy of some of its prototypes; `columns_K` ascend."""
        rows_K = columns_K + self.rows_C.start if isinstance(self.rows_C, range) else self.rows_C[columns_K]
        return replace(
            self, weight_CD=self.weight_CD[columns_K], rows_C=rows_K, objective=self.objective.only(columns_K)
        )

    @property
    def bounded(self) -> bool:
        """Whether exp(logit) can neither overflow nor vanish."""
        return self.margin.normalised and self.margin.scale <= SAFE_SCALE


def inverse_length(vectors_ND: Tensor, margin: MarginConfig) -> Tensor:
    """(N, 1) factor that brings each vector to how the head's convention takes it: 1 / length, or 1."""
    if not margin.normalised:
        return vectors_ND.new_ones(len(vectors_ND), 1)
    length_N1: Tensor = torch.linalg.vector_norm(vectors_ND, dim=1, keepdim=True)
    return length_N1.clamp_min_(TINY).reciprocal_()


def through_unit_(gradient_ND: Tensor, unit_ND: Tensor, inverse_N1: Tensor, margin: MarginConfig) -> Tensor:
    """Turn, in place, the gradient with respect to unit vectors into that with respect to the vectors themselves."""
    if not margin.normalised:
        return gradient_ND
    along_N1 = torch.linalg.vecdot(gradient_ND, unit_ND).unsqueeze(1)
    return gradient_ND.addcmul_(unit_ND, along_N1, value=-1).mul_(inverse_N1)


@dataclass(frozen=True)
class HeadBatch:
    """The gathered batch as one head sees it.

    A larger new dimension is compared by its leading slice, renormalised (Shen et al. 2020, section 3.4).

    Attributes:
        unit_BD: features as the head's convention takes them; `inverse_B1` the factor that made them so.
        column_B: place of the own prototype among this rank's, or NOT_HERE.
        here_M: samples whose own prototype is here, and of each
        own_MD: the own prototype, as the convention takes it,
        own_logit_M: its logit, margin and scale included,
        own_slope_M: d own logit / d cosine.
    """

    head: Head
    unit_BD: Tensor
    inverse_B1: Tensor
    column_B: Tensor
    here_M: Tensor
    own_MD: Tensor
    own_logit_M: Tensor
    own_slope_M: Tensor

    @classmethod
    def of(cls, head: Head, features_BD: Tensor, labels_B: Tensor) -> HeadBatch:
        """Find the samples whose own prototype is here and score them with the margin."""
        features_BD = features_BD[:, : head.weight_CD.shape[1]]
        inverse_B1 = inverse_length(features_BD, head.margin)
        unit_BD = features_BD * inverse_B1
        column_B = head.columns_of(labels_B)
        here_M = torch.nonzero(column_B != NOT_HERE).flatten()
        own_MD = head.weight_CD[column_B[here_M]]
        own_MD = own_MD * inverse_length(own_MD, head.margin)
        logit_M, slope_M = apply_margin((unit_BD[here_M] * own_MD).sum(dim=1), head.margin)
        return cls(head, unit_BD, inverse_B1, column_B, here_M, own_MD, logit_M, slope_M)

    def own_error(self, log_sum_exp_B: Tensor) -> Tensor:
        """(M,) d loss / d cosine of the own identity: (probability - 1) times the margin's slope."""
        return torch.expm1(self.own_logit_M - log_sum_exp_B[self.here_M]) * self.own_slope_M


@dataclass(frozen=True)
class Scan:
    """What one pass over this rank's prototypes says of a batch, the own identities left out.

    Attributes:
        maximum_B: what was taken off the logits before their exponential.
        sum_B: sum of exp(logit - maximum).
        pull_BD: sum of exp(logit - maximum) * prototype: the feature gradient but for its factors.
        inverse_C1: the factor of each prototype, for the second pass.
    """

    maximum_B: Tensor
    sum_B: Tensor
    pull_BD: Tensor
    inverse_C1: Tensor


def statistics(batch: HeadBatch, scan: Scan) -> Tensor:
    """(B, STATISTICS) of this rank; the own logit is minus infinity where the own prototype is not here."""
    own_B = torch.full_like(scan.sum_B, -torch.inf).index_copy(0, batch.here_M, batch.own_logit_M)
    return torch.stack([scan.maximum_B, scan.sum_B, own_B], dim=1)


def combine(statistics_WHBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the statistics of all ranks.

    Returns:
        (H, B) log-sum-exp over the whole classifier, logit of the own identity, and bool, whether the identity has a
        prototype in that classifier at all. A NaN stays one: it must not pass for "no prototype".
    """
    own_HB = statistics_WHBS[..., OWN_LOGIT].amax(dim=0)
    maximum_HB = torch.maximum(statistics_WHBS[..., MAXIMUM].amax(dim=0), own_HB)
    sum_HB = (statistics_WHBS[..., SUM_EXP] * torch.exp(statistics_WHBS[..., MAXIMUM] - maximum_HB)).sum(dim=0)
    sum_HB = sum_HB + torch.exp(own_HB - maximum_HB)
    smallest = torch.finfo(sum_HB.dtype).tiny  # a head without any prototype has no sum
    return maximum_HB + torch.log(sum_HB.clamp_min(smallest)), own_HB, own_HB != -torch.inf


def feature_gradient(batch: HeadBatch, scan: Scan, log_sum_exp_B: Tensor, weight_B: Tensor) -> Tensor:
    """(B, D) gradient of sum_b weight_b * (log_sum_exp_b - own_logit_b): this rank's share, to be summed over ranks."""
    share_B = torch.exp(scan.maximum_B - log_sum_exp_B) * weight_B * batch.head.margin.scale
    gradient_BD = scan.pull_BD * share_B[:, None]
    own_M = batch.own_error(log_sum_exp_B) * weight_B[batch.here_M]
    gradient_BD.index_add_(0, batch.here_M, batch.own_MD * own_M[:, None])
    return through_unit_(gradient_BD, batch.unit_BD, batch.inverse_B1, batch.head.margin)
