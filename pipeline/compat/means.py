"""Class means: where the parent's features of each identity lie, and how far around."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# First and last row of the new table -> each image of those identities once, with its row.
ImagesOf = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]
# Identities whose images' features a rank holds at a time, and images of one identity in one graph.
REFINED_IDENTITIES, REFINED_IMAGES = 16384, 2048


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


def class_spread(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    means_CD: Tensor,
    first_row: int,
    share: float,
) -> Tensor:
    """The cosine to its identity's mean that `share` of the identity's images reach; share 1: the furthest image's.

    A second pass over the images: only one number an image is kept.

    Args:
        backbone: in evaluation mode.
        batches: as of `class_means`.
        means_CD: (C, D) of `class_means`.
        first_row: of the table, of `means_CD[0]`.
        share: above 0, at most 1.

    Returns:
        (C,) cosines; 1 for an identity without images.
    """
    centre_CD, count_C = F.normalize(means_CD.double()), means_CD.new_zeros(len(means_CD), dtype=torch.int64)
    cosines, columns = [means_CD.new_zeros(0, dtype=torch.float64)], [count_C[:0]]
    with torch.no_grad():
        for images_BCHW, rows_B in batches:
            columns.append(rows_B - first_row)
            cosines.append(torch.linalg.vecdot(F.normalize(backbone(images_BCHW).double()), centre_CD[columns[-1]]))
    cosine_N, column_N = torch.cat(cosines), torch.cat(columns)
    count_C.index_add_(0, column_N, torch.ones_like(column_N))
    nearest_N = torch.argsort(cosine_N, descending=True)
    sorted_N = cosine_N[nearest_N[torch.argsort(column_N[nearest_N], stable=True)]]  # by identity, the nearest first
    place_C = count_C.cumsum(0) - count_C + (count_C * share).ceil().long() - 1
    there_C = count_C > 0
    spread_C = torch.ones_like(centre_CD[:, 0])
    spread_C[there_C] = sorted_N[place_C[there_C]]
    return spread_C.to(means_CD.dtype)


def refined_means(
    backbone: nn.Module,
    images_of: ImagesOf,
    first_row: int,
    end_row: int,
    dim: int,
    device: torch.device | str,
    walk: float,
    temperature: float,
) -> Tensor:
    """Class means in which an image counts as much as its neighbours of the same identity say: see `image_weights`.

    Identities are taken by blocks, whose features lie in host memory; every image is still read once.

    Returns:
        (end_row - first_row, dim) weighted means of unit features, not normalised; 0 without images.
    """
    means_CD = torch.zeros(end_row - first_row, dim)
    for start in range(first_row, end_row, REFINED_IDENTITIES):
        unit_ND, rows_N = _unit_features(backbone, images_of(start, min(start + REFINED_IDENTITIES, end_row)), dim)
        rows_N, order_N = torch.sort(rows_N, stable=True)
        rows, counts = torch.unique_consecutive(rows_N, return_counts=True)
        for row, own_nD in zip(rows.tolist(), unit_ND[order_N].split(counts.tolist()), strict=True):
            for group_nD in own_nD.split(REFINED_IMAGES):
                refined_D = image_weights(group_nD.to(device), walk, temperature).cpu() @ group_nD
                means_CD[row - first_row] += refined_D * (len(group_nD) / len(own_nD))
    return means_CD.to(device)


def image_weights(unit_nD: Tensor, walk: float, temperature: float) -> Tensor:
    """How much each of one identity's images counts in its prototype (Zhang et al., IJCAI 2022, Eq. 9 and 10).

    Edges E between the images are the softmax, over the others, of their features' cosines by a temperature. With
    V the features, (1 - walk) (I - walk E)^-1 V are the refined ones, of which the prototype is the mean: the weights
    are the sums of that matrix's columns, divided by n. An image that is far from the others gets little.

    Args:
        unit_nD: (n, D) unit features of the images.
        walk: above 0, below 1: how much is taken from neighbours.
        temperature: of the softmax.

    Returns:
        (n,) weights with the sum 1.
    """
    images = len(unit_nD)
    uniform_n = unit_nD.new_full((images,), 1 / images)
    if images == 1:
        return uniform_n
    edges_nn = (unit_nD @ unit_nD.T / temperature).fill_diagonal_(-torch.inf).softmax(dim=1)
    back_nn = torch.eye(images, dtype=unit_nD.dtype, device=unit_nD.device) - walk * edges_nn.T
    weight_n: Tensor = torch.linalg.solve(back_nn, (1 - walk) * uniform_n)
    return weight_n


def _unit_features(backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    units, rows = [torch.zeros(0, dim)], [torch.zeros(0, dtype=torch.int64)]
    with torch.no_grad():
        for images_BCHW, rows_B in batches:
            units.append(F.normalize(backbone(images_BCHW).float()).cpu())
            rows.append(rows_B.cpu())
    return torch.cat(units), torch.cat(rows)
