"""Universal backward-compatible training: refined prototypes of all identities."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.compat.base import Method, Parent
from pipeline.compat.means import ImagesOf, refined_means
from pipeline.compat.methods.bct import influence_margin, means_head
from pipeline.model.heads import Head


class UniBct(Method):
    """The influence loss over refined class means of the parent's features, for every identity, known to it or not.

    Source: Zhang et al., "Towards Universal Backward-Compatible Representation Learning", IJCAI 2022, structural
    prototype refinement (Eq. 9 and 10): an identity's images are a graph, on which old features are averaged over
    neighbours by a random walk before their mean is taken, so that outliers of a poor parent count little. Theirs
    takes the edges from the new model's features, anew now and then as it learns; ours from the parent's own, once
    before the first step, since there is no new model then and a frozen head can be resumed. The graph is one
    identity's, so ranks need nothing of each other. The defaults are those of a public implementation by others.
    """

    method: Literal["unibct"] = "unibct"
    walk: float = Field(0.9, gt=0, lt=1, description="share that an image takes from its neighbours")
    temperature: float = Field(0.05, gt=0, description="of the softmax over an image's neighbours")
    margin: float | None = Field(
        None, ge=0, lt=1, description="cosine margin of the influence loss; none: the parent's own margin"
    )

    @property
    def asks_means(self) -> bool:
        """Refined."""
        return True

    def means(
        self, backbone: nn.Module, images_of: ImagesOf, first_row: int, end_row: int, dim: int, device: torch.device
    ) -> Tensor:
        """(C, D_old) refined means."""
        return refined_means(backbone, images_of, first_row, end_row, dim, device, self.walk, self.temperature)

    def heads(self, parent: Parent) -> list[Head]:
        """One: the refined prototypes."""
        head = means_head(parent)
        return [replace(head, margin=influence_margin(head.margin, self.margin))]
