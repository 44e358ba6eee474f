"""What the influence loss is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.bct import distilled
from pipeline.model.heads import Head
from pipeline.model.terms import BatchLoss


class Independent(Method):
    """No tie to any parent: the paragon (Shen et al. 2020, section 3.1)."""

    method: Literal["independent"] = "independent"
    takes_parents = False


class Finetune(Method):
    """No tie but the beginning: the backbone starts from the parent's weights, and goes its own way.

    Source: a baseline of Shen et al. 2020, section 4. It needs the parent's architecture.
    """

    method: Literal["finetune"] = "finetune"
    starts_from_parent = True


class L2(Method):
    """Regression of the new features to the parent's, on every image.

    Source: a baseline of Shen et al. 2020, section 4: the squared distance of the two features. They are compared at
    length 1, as they are searched; a larger new dimension by its leading values.
    """

    method: Literal["l2"] = "l2"
    asks_features = True

    def batch_losses(self, parent: Parent) -> list[BatchLoss]:
        """One: the distance."""
        return [Regression(parent.name, parent.guide)]


@dataclass(frozen=True)
class Regression:
    """Squared distance of unit features."""

    name: str
    guide: slice

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        """See `BatchLoss`."""
        del labels_B
        old_bE = guides_BE[own, self.guide]
        return (F.normalize(features_BD[own, : old_bE.shape[1]]) - F.normalize(old_bE)).square().sum(dim=1)


class Lwf(Method):
    """Learning without forgetting: what the parent's classifier says of its own features is to be said of the new.

    Source: Li and Hoiem, ECCV 2016, Eq. 2 to 4, as a baseline of Shen et al. 2020, section 4: on every image, at
    temperature 2 by default. The old classifier is frozen here: a moving one would leave the gallery's space.
    """

    method: Literal["lwf"] = "lwf"
    asks_features = True
    temperature: float = Field(2.0, gt=0, description="divides the logits on both sides")

    def heads(self, parent: Parent) -> list[Head]:
        """One: the parent's classifier."""
        return [distilled(parent, parent.name, self.temperature, unknown_only=False)]
