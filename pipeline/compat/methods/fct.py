"""The other road: the parent's gallery is mapped to the new space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat.base import Companion, Method, Parent
from pipeline.model.maps import LearnedMap, MapConfig, SpaceMap

WIDENING = 4  # 2048 for 512 dimensions, as the paper's inner layers are wide


class Fct(Method):
    """A perceptron h takes the parent's gallery vectors to the new space, where new queries search in full dimension.

    Source: Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022
    (arXiv 2112.02805): the new model is trained independently, and the squared distance of h(old feature) to the new
    one is made small. Their h is also given side information, which a parent would have had to store beside each
    gallery vector; galleries as they are have none, and h does without. Ours: layer norms in place of batch norms; two
    inner layers; features compared at length 1. All of the old gallery must pass through h once, without its images.
    The backbone trains as the paragon does, as long as no clipping ties the norms of their gradients together.
    """

    method: Literal["fct"] = "fct"
    asks_features = True
    hidden: int | None = Field(None, ge=1, description="width of h; none: 4 times the new dimension")

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """A map for each parent."""
        return Forward(dim, parents, self.hidden or WIDENING * dim) if parents else None


class Forward(Companion):
    """The maps from all parents' spaces; the classifier sees the features as they are."""

    def __init__(self, dim: int, parents: Sequence[Parent], hidden: int) -> None:
        super().__init__()
        self.losses = tuple(parent.name for parent in parents)
        self.guides = [parent.guide for parent in parents]
        self.configs = [
            MapConfig(
                parent=parent.name,
                direction="gallery",
                kind="mlp",
                inputs=parent.guide.stop - parent.guide.start,
                outputs=dim,
                hidden=hidden,
            )
            for parent in parents
        ]
        self.maps = nn.ModuleList(SpaceMap(config) for config in self.configs)

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Companion`."""
        del labels_b
        unit_bD = F.normalize(features_bD.detach())
        losses = [
            (one(guides_bE[:, guide]).float() - unit_bD).square().sum(dim=1)
            for one, guide in zip(self.maps, self.guides, strict=True)
        ]
        return features_bD, torch.stack(losses, dim=1)

    def exported_maps(self, state: Mapping[str, Tensor]) -> list[LearnedMap]:
        """The parent's gallery in the new space."""
        maps = []
        for index, config in enumerate(self.configs):
            start = f"maps.{index}."
            weights = {name: value for name, value in state.items() if name.startswith(start)}
            maps.append(LearnedMap(config, {name.removeprefix(start): value for name, value in weights.items()}))
        return maps
