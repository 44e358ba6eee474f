"""Old features mixed with new ones before the new classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.base import Companion, Method, Parent
from pipeline.model import collectives


class MixBct(Method):
    """The new classifier sees, in place of a share of the new features, the parent's features of the same images.

    Source: Liang et al., "MixBCT: Towards Self-Adapting Backward-Compatible Training", 2023 (arXiv 2308.06948). Theirs:
    one loss over the mixed features, a share of 0.3, and only old features among the nearest 90 % of their identity
    to its mean. Ours: each sample is drawn on its own, so that the share holds on average; an old feature is taken of
    the augmented image of the step, held against the boundary of the plain ones, and brought to the length of the
    new feature that it replaces, which matters to an unnormalised classifier only; a larger new dimension is filled
    with zeros; of several parents each drawn sample meets one. To ask the rank that holds an identity's mean costs
    three small collectives a step; without `nearest` there are none.
    """

    method: Literal["mixbct"] = "mixbct"
    asks_features = True
    share: float = Field(0.3, gt=0, lt=1, description="of the samples whose feature is the parent's")
    nearest: float | None = Field(
        0.9, gt=0, le=1, description="of an identity's old features, the share that may be taken; none: all"
    )

    @property
    def asks_means(self) -> bool:
        """Where old features are held against them."""
        return self.nearest is not None

    @property
    def asks_spread(self) -> float | None:
        """Of those that may be taken."""
        return self.nearest

    @model_validator(mode="after")
    def _has_no_lambda(self) -> Self:
        if (self.weight, self.weight_end, self.warmup) != (1.0, None, 0.0):
            raise ValueError("method 'mixbct' has one loss and no lambda: remove weight, weight_end, warmup; set share")
        return self

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """What mixes."""
        del dim
        return Mixture(parents, self.share, self.nearest is not None) if parents else None


class Mixture(Companion):
    """Replaces features by a parent's, by torch's default generator, which the trainer seeds for each step and rank."""

    def __init__(self, parents: Sequence[Parent], share: float, denoise: bool) -> None:
        super().__init__()
        # No buffers: those would be averaged over the ranks, and each rank has its own identities' means.
        self.parents, self.share, self.denoise = tuple(parents), share, denoise

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Companion`."""
        samples, dim = features_bD.shape
        drawn_b = torch.rand(samples, device=features_bD.device) < self.share
        parent_b = torch.randint(len(self.parents), (samples,), device=features_bD.device)
        credible_bP = self._credible(guides_bE, labels_b)
        mixed_bD, length_b1 = features_bD, features_bD.detach().norm(dim=1, keepdim=True)
        for number, parent in enumerate(self.parents):
            old_bD = F.normalize(guides_bE[:, parent.guide])
            old_bD = F.pad(old_bD, (0, dim - old_bD.shape[1])).to(features_bD.dtype) * length_b1
            taken_b = drawn_b & (parent_b == number) & credible_bP[:, number]
            mixed_bD = torch.where(taken_b[:, None], old_bD, mixed_bD)
        return mixed_bD, features_bD.new_zeros(samples, 0)

    def _credible(self, guides_bE: Tensor, labels_b: Tensor) -> Tensor:
        """(b, parents) bool: which old features lie within their identity's boundary, asked of all ranks."""
        samples = len(labels_b)
        if not self.denoise:
            return torch.ones(samples, len(self.parents), dtype=torch.bool, device=labels_b.device)
        mesh = self.parents[0].mesh
        longest = labels_b.new_tensor(samples)
        if mesh.shard_group is not None:
            dist.all_reduce(longest, dist.ReduceOp.MAX, mesh.shard_group)
        guides_BE, labels_B = collectives.gather_batch(guides_bE, labels_b, int(longest), mesh.shard_group)
        near_BP = torch.stack([_near(parent, guides_BE, labels_B) for parent in self.parents], dim=1)
        if mesh.shard_group is not None:
            dist.all_reduce(near_BP, dist.ReduceOp.MAX, mesh.shard_group)
        return near_BP[mesh.shard * int(longest) :][:samples] > 0


def _near(parent: Parent, guides_BE: Tensor, labels_B: Tensor) -> Tensor:
    """(B,) int32: 1 where the identity is this rank's and the old feature is within its boundary."""
    assert parent.means_CD is not None, "the method asks for class means"
    assert parent.spread_C is not None, "the method asks for the spread"
    column_B = labels_B - parent.first_row
    here_M = torch.nonzero((column_B >= 0) & (column_B < len(parent.means_CD))).flatten()
    centre_MD = F.normalize(parent.means_CD[column_B[here_M]])
    cosine_M = torch.linalg.vecdot(F.normalize(guides_BE[here_M, parent.guide]), centre_MD.to(guides_BE.dtype))
    near_B = torch.zeros_like(labels_B, dtype=torch.int32)
    near_B[here_M] = (cosine_M >= parent.spread_C[column_B[here_M]] - 1e-6).int()
    return near_B
