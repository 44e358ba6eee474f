"""A linear map of an independently trained model's queries to the parent's space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat.base import Companion, Method, Parent
from pipeline.model.maps import LearnedMap, MapConfig


class AffineAdapter(Method):
    """An affine map W u + b of the new unit features u, fitted to the parent's unit features by squared distance.

    Source: the unregularised case of Ricci et al. 2025 (see `OrthogonalAdapter`). The map never reaches into the
    backbone, which trains as the paragon does, as long as no clipping ties the norms of their gradients together.
    """

    method: Literal["affine-adapter"] = "affine-adapter"
    asks_features = True

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """A map for each parent."""
        return Adapters(dim, parents, None, 0.0) if parents else None


class OrthogonalAdapter(Method):
    """An affine map of the new features to the parent's, kept nearly orthogonal so that the new space keeps its shape.

    Source: Ricci et al., "lambda-Orthogonality Regularization for Compatible Representation Learning", 2025
    (arXiv 2509.16664): the distance of W W^T from the identity, in the Frobenius norm, is penalised beyond lambda,
    here `slack`; lambda 0 asks for an orthogonal map. The new model is trained independently, the map aligned to
    the parent's features. Ours: the penalty is the distance beyond the slack itself; W^T W takes the place of W W^T
    where the parent's space is the larger one; the map of the old gallery and the contrastive loss are left out.
    """

    method: Literal["orthogonal-adapter"] = "orthogonal-adapter"
    asks_features = True
    slack: float = Field(1.0, ge=0, description="distance of W W^T from the identity that costs nothing")
    regularisation: float = Field(1.0, ge=0, description="factor on the distance beyond the slack")

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """A map for each parent."""
        return Adapters(dim, parents, self.slack, self.regularisation) if parents else None


class Adapters(Companion):
    """The maps to all parents' spaces; the classifier sees the features as they are.

    Args:
        dim: of the new features.
        parents: whose spaces they lead to.
        slack: of the penalty; None: there is none.
        regularisation: its factor.
    """

    def __init__(self, dim: int, parents: Sequence[Parent], slack: float | None, regularisation: float) -> None:
        super().__init__()
        self.dim, self.slack, self.regularisation = dim, slack, regularisation
        self.parents = [(parent.name, parent.guide) for parent in parents]
        self.losses = tuple(name for name, _ in self.parents)
        if slack is not None:
            self.losses += tuple(f"{name}/orthogonality" for name, _ in self.parents)
        self.adapters = nn.ModuleList(_Affine(dim, guide.stop - guide.start) for _, guide in self.parents)

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Companion`. The penalty is the same for every sample, and so for their mean."""
        del labels_b
        distances, penalties = [], []
        unit_bD = F.normalize(features_bD.detach())
        for adapter, (_, guide) in zip(self.adapters, self.parents, strict=True):
            mapped_bE, departure = adapter(unit_bD)
            distances.append((mapped_bE - F.normalize(guides_bE[:, guide])).square().sum(dim=1))
            if self.slack is not None:
                penalties.append((self.regularisation * F.relu(departure - self.slack)).expand(len(unit_bD)))
        return features_bD, torch.stack(distances + penalties, dim=1)

    def exported_maps(self, state: Mapping[str, Tensor]) -> list[LearnedMap]:
        """A query in the parent's space."""
        maps = []
        for index, (name, guide) in enumerate(self.parents):
            config = MapConfig(
                parent=name, direction="query", kind="linear", inputs=self.dim, outputs=guide.stop - guide.start
            )
            weights = {"weight": state[f"adapters.{index}.weight_ED"], "bias": state[f"adapters.{index}.bias_E"]}
            maps.append(LearnedMap(config, {f"layers.{key}": value for key, value in weights.items()}))
        return maps


class _Affine(nn.Module):
    """An affine map, and how far it is from an orthogonal one. It begins with the leading values."""

    def __init__(self, dim: int, old_dim: int) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.eye(old_dim, dim))
        self.bias_E = nn.Parameter(torch.zeros(old_dim))

    def forward(self, unit_bD: Tensor) -> tuple[Tensor, Tensor]:
        """(b, D_old) mapped features, and ()."""
        with torch.autocast(unit_bD.device.type, enabled=False):  # bf16 would blur the distance from the identity
            return F.linear(unit_bD, self.weight_ED, self.bias_E), departure(self.weight_ED)


def departure(weight_ED: Tensor) -> Tensor:
    """() Frobenius norm of W W^T - I on the smaller side of W: 0 for rows, or columns, that are orthonormal."""
    short_ED = weight_ED if weight_ED.shape[0] <= weight_ED.shape[1] else weight_ED.T
    excess_EE = short_ED @ short_ED.T - torch.eye(len(short_ED), device=weight_ED.device, dtype=weight_ED.dtype)
    distance: Tensor = torch.linalg.matrix_norm(excess_EE)
    return distance
