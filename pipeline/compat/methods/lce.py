"""Learning compatible embeddings: new features stay where the parent's features of their identity are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.bct import means_head
from pipeline.model.heads import Approach, Head
from pipeline.model.margins import MarginConfig

LEAST_RADIUS = 1e-6  # cosine distance: an identity of one image has no boundary


class Lce(Method):
    """New features lie within the old boundary of their identity, and are classified by the old class centres.

    Source: Meng et al., "Learning Compatible Embeddings", ICCV 2021, backward and direct (no transformation). Theirs:
    the centre, which is the mean of an identity's unit features; the boundary, which is the furthest of them; the
    loss max(0, boundary's cosine - feature's cosine). Theirs too is a squared distance of the new classifier's
    prototypes to the old centres. Ours in its place: the new loss with the old centres for prototypes, which is what
    the new classifier's loss becomes where that distance is 0; it needs no gradient to other ranks' prototypes.
    `boundary: mean` takes the mean cosine, which the class means tell by their length: images are read once less.
    """

    method: Literal["lce"] = "lce"
    boundary: Literal["furthest", "mean"] = Field(
        "furthest", description="of the parent's features of an identity, the one at its boundary"
    )
    boundary_weight: float = Field(1.0, gt=0, description="factor on the boundary's loss, beside lambda")
    align: bool = Field(True, description="whether to classify by the old centres")

    @property
    def asks_means(self) -> bool:
        """They are the centres."""
        return True

    @property
    def asks_spread(self) -> float | None:
        """The furthest image's."""
        return 1.0 if self.boundary == "furthest" else None

    def heads(self, parent: Parent) -> list[Head]:
        """The old centres under the new generation's margin, and the boundary."""
        assert parent.means_CD is not None, "the method asks for class means"
        reached_C = parent.means_CD.norm(dim=1) if self.boundary == "mean" else parent.spread_C
        assert reached_C is not None, "the method asks for the spread"
        weight = self.boundary_weight

        def penalty(cosine_M: Tensor, radius_M: Tensor) -> Tensor:
            return weight * (1 - cosine_M - radius_M).clamp_min(0)

        boundary = boundary_head(parent, 1 - reached_C, penalty)
        return [centres_head(parent), boundary] if self.align else [boundary]


def centres_head(parent: Parent) -> Head:
    """The class means under the new generation's margin, or the parent's if the new one has no cosines."""
    head = means_head(parent)
    return replace(head, margin=parent.margin) if parent.margin.normalised else head


def boundary_head(parent: Parent, radius_C: Tensor, penalty: Callable[[Tensor, Tensor], Tensor]) -> Head:
    """A penalty on the way to the class mean, for the identities that have a boundary.

    Args:
        parent: with (C, D_old) class means.
        radius_C: (C,) of each of them, 0 where all its images are one.
        penalty: see `Approach`.
    """
    assert parent.means_CD is not None, "the method asks for class means"
    there_C = (parent.means_CD.norm(dim=1) > 0) & (radius_C > LEAST_RADIUS)
    rows_C = torch.arange(len(radius_C), device=radius_C.device) + parent.first_row
    centre_CD = F.normalize(parent.means_CD[there_C])
    cosines = MarginConfig(name="norm_softmax", scale=1.0)
    return Head(f"{parent.name}/boundary", centre_CD, rows_C[there_C], cosines, Approach(radius_C[there_C], penalty))
