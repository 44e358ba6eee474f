"""Class means: where the parent's features of each identity lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def class_means(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    first_row: int,
    end_row: int,
    dim: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mean of the unit features of each identity's images (Shen et al. 2020, section 3.3).

    A rank asks for the images of its own rows alone, so that no rank talks to another and none holds more than its
    part of the means. An identity without images has the mean 0.

    Args:
        backbone: in evaluation mode, on `device`.
        batches: (B, C, H, W) images and their (B,) rows of the identity table, each image once.
        first_row: of the table, of this rank.
        end_row: after the last.
        dim: of the features.
        device: where the images are.

    Returns:
        (end_row - first_row, dim) means, not normalised: the length, at most 1, is how close together the features lie.
    """
    sum_CD = torch.zeros(end_row - first_row, dim, dtype=torch.float64, device=device)
    count_C = torch.zeros(end_row - first_row, dtype=torch.float64, device=device)
    with torch.no_grad():
        for images_BCHW, rows_B in batches:
            unit_BD = F.normalize(backbone(images_BCHW).double())
            sum_CD.index_add_(0, rows_B - first_row, unit_BD)
            count_C.index_add_(0, rows_B - first_row, torch.ones_like(rows_B, dtype=torch.float64))
    return (sum_CD / count_C.clamp_min(1)[:, None]).float()
