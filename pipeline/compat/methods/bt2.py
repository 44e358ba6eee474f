"""An orthogonal change of basis, whose leading directions are the parent's space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat.base import Companion, Method, Parent
from pipeline.errors import ConfigError
from pipeline.model.maps import LearnedMap, MapConfig


class Bt2(Method):
    """A learned rotation Q of the new features, the first D_old values of which are held to the parent's features.

    Source: Zhou et al., "BT^2: Backward-compatible Training with Basis Transformation", ICCV 2023 (arXiv 2211.03989):
    an orthogonal map loses nothing, so that compatibility lies in some directions of the new space, and dimensions
    beyond the parent's leave room for what is new. The tie is the paper's: one minus the cosine to the parent's feature
    of the same image. Ours: a single rotation of the whole new feature, whose cosines it leaves alone, in place of
    the paper's layers around the added dimensions; no independently trained model as a second target.
    """

    method: Literal["bt2"] = "bt2"
    asks_features = True

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """A rotation for each parent.

        Raises:
            ConfigError: the new features have fewer values than a parent's.
        """
        for parent in parents:
            if (old_dim := parent.generation.record.embedding_dim) > dim:
                raise ConfigError(
                    f"compat.method 'bt2' needs backbone.embedding_dim of at least {old_dim}, that of {parent.name!r}; "
                    f"it is {dim}"
                )
        return Rotations(dim, parents) if parents else None


class Rotations(Companion):
    """The rotations towards all parents; the classifier sees the features as they are."""

    def __init__(self, dim: int, parents: Sequence[Parent]) -> None:
        super().__init__()
        self.dim = dim
        self.losses = tuple(parent.name for parent in parents)
        self.guides = [parent.guide for parent in parents]
        self.rotations = nn.ModuleList(_Rotation(dim, guide.stop - guide.start) for guide in self.guides)

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Companion`."""
        del labels_b
        losses = [
            1 - F.cosine_similarity(rotation(features_bD), guides_bE[:, guide])
            for rotation, guide in zip(self.rotations, self.guides, strict=True)
        ]
        return features_bD, torch.stack(losses, dim=1)

    def exported_maps(self, state: Mapping[str, Tensor]) -> list[LearnedMap]:
        """The leading rows of each rotation: a query in the parent's space."""
        maps = []
        for index, (name, guide) in enumerate(zip(self.losses, self.guides, strict=True)):
            old_dim = guide.stop - guide.start
            config = MapConfig(
                parent=name, direction="query", kind="linear", inputs=self.dim, outputs=old_dim, bias=False
            )
            rows_ED = rotation_matrix(state[f"rotations.{index}.angles_A"], self.dim)[:old_dim]
            maps.append(LearnedMap(config, {"layers.weight": rows_ED}))
        return maps


class _Rotation(nn.Module):
    """The leading values of rotated features. It begins with no rotation, which is the slice of Shen et al. 2020."""

    def __init__(self, dim: int, old_dim: int) -> None:
        super().__init__()
        self.dim, self.old_dim = dim, old_dim
        # A vector, so that the optimiser decays it no more than a bias.
        self.angles_A = nn.Parameter(torch.zeros(dim * (dim - 1) // 2))

    def forward(self, features_bD: Tensor) -> Tensor:
        """(b, D_old)."""
        with torch.autocast(features_bD.device.type, enabled=False):  # bf16 products are not orthogonal
            rows_ED = rotation_matrix(self.angles_A, self.dim)[: self.old_dim]
            return features_bD @ rows_ED.T


def rotation_matrix(angles_A: Tensor, dim: int) -> Tensor:
    """(dim, dim) exponential of the skew-symmetric matrix with `angles_A` below its diagonal: any rotation there is."""
    row_A, column_A = torch.tril_indices(dim, dim, offset=-1, device=angles_A.device)
    lower_DD = angles_A.new_zeros(dim, dim).index_put((row_A, column_A), angles_A)
    rotation_DD: Tensor = torch.linalg.matrix_exp(lower_DD - lower_DD.T)
    return rotation_DD
