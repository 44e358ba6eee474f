"""This project's own: prototypes that are the parent's features as they come, not their means."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.bct import cosine_margin, influence_margin
from pipeline.model.heads import Follow, Head


class Live(Method):
    """The influence loss over a gallery that lives: the prototype of an identity is the parent's latest feature of it.

    Source: this project; the influence loss is that of Shen et al., CVPR 2020, Eq. 5. A new query is to be found among
    single old features, of augmented images and with all their scatter, not among prototypes, which are tidier than
    any gallery: the parent's own were trained to be, class means are averages. So the parent embeds each batch, and
    after the step the prototypes of its identities are what it gave (the mean, of several samples of one identity).
    A sample never meets its own old feature. They start as class means; every identity has one, known to the parent
    or not. The loss keeps the parent's margin and scale. It costs the parent's forward pass and, of what ranks tell
    each other, its features in the one gather.
    """

    method: Literal["live"] = "live"
    asks_features = True
    margin: float | None = Field(
        None, ge=0, lt=1, description="cosine margin of the influence loss; none: the parent's own margin"
    )

    @property
    def asks_means(self) -> bool:
        """Where the prototypes start."""
        return True

    def heads(self, parent: Parent) -> list[Head]:
        """One, whose prototypes follow the parent."""
        assert parent.means_CD is not None, "the method asks for class means"
        rows = range(parent.first_row, parent.first_row + len(parent.means_CD))
        start_CD = F.normalize(parent.means_CD).to(torch.float32)
        margin = influence_margin(cosine_margin(parent), self.margin)
        return [Head(parent.name, start_CD, rows, margin, Follow(parent.guide))]
