"""This project's own method, measured beside the others in docs/RESULTS.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.bct import influence_margin, joined_head
from pipeline.compat.methods.ract import Contrast
from pipeline.model.heads import Head
from pipeline.model.terms import BatchLoss


class Anchored(Method):
    """Prototypes and single features at once: the influence loss over all identities, and a contrast to old features.

    The influence loss over the parent's prototypes, joined by class means of its features for the new identities
    (Shen et al. 2020, section 3.3), says where an identity lies in the old space, but not how the old features of
    single images, which are what a gallery holds, scatter about that place. The contrast (as in Zhang et al., ICLR
    2022, with old negatives alone) says that, for the images of a batch. Both travel in the classifier's collectives:
    the second costs the parent's features of the batch, and B x B products.
    """

    method: Literal["anchored"] = "anchored"
    asks_features = True
    contrast: float = Field(1.0, ge=0, description="factor on the contrast, beside lambda")
    temperature: float = Field(0.05, gt=0, description="divides the contrast's cosines")
    margin: float | None = Field(
        0.0, ge=0, lt=1, description="cosine margin of the influence loss; none: the parent's own margin"
    )
    confidence: float = Field(
        0.0, ge=0, lt=1, description="least length of the mean of an identity's unit features for it to be synthesised"
    )

    @property
    def asks_means(self) -> bool:
        """Of the new identities."""
        return True

    def heads(self, parent: Parent) -> list[Head]:
        """The joined prototypes."""
        head = joined_head(parent, self.confidence)
        return [replace(head, margin=influence_margin(head.margin, self.margin))]

    def batch_losses(self, parent: Parent) -> list[BatchLoss]:
        """The contrast."""
        if not self.contrast:
            return []
        plain = Contrast(f"{parent.name}/contrast", parent.guide, self.temperature, new_negatives=False)
        return [Weighted(plain, self.contrast)]


@dataclass(frozen=True)
class Weighted:
    """Another loss times a factor."""

    loss: BatchLoss
    factor: float

    @property
    def name(self) -> str:
        """The other's."""
        return self.loss.name

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        """See `BatchLoss`."""
        return self.factor * self.loss(features_BD, guides_BE, labels_B, own)
