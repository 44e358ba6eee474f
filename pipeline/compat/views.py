"""What a method sees of the parents: each aligned to the new table, and cut to one rank's part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.compat.base import Method, Parent
from pipeline.compat.means import ImagesOf as ImagesOf
from pipeline.compat.means import class_spread
from pipeline.compat.parents import load_parent_head, prototype_length
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import row_range


def view_parents(
    parents: Sequence[Generation],
    method: Method,
    identities: IdentityTable,
    margin: MarginConfig,
    mesh: ClassMesh,
    device: torch.device,
    images_of: ImagesOf | None,
) -> list[Parent]:
    """Make all that the method asks for of each parent.

    Raises:
        GenerationError: a parent does not have it.
    """
    views: list[Parent] = []
    first_row, end_row = row_range(len(identities), mesh.shard, mesh.shards)
    start = 0
    for parent in parents:
        method.check_parent(parent)
        dim = parent.record.embedding_dim
        means_CD = spread_C = None
        if method.asks_means and parent.record.backbone is not None:
            assert images_of is not None, "class means are made of images"
            backbone = parent.load_backbone().to(device)
            means_CD = method.means(backbone, images_of, first_row, end_row, dim, device)
            if method.asks_spread is not None:
                images = images_of(first_row, end_row)
                spread_C = class_spread(backbone, images, means_CD, first_row, method.asks_spread)
        views.append(
            Parent(
                generation=parent,
                head=load_parent_head(parent, identities, mesh, device),
                guide=slice(start, start + dim),
                means_CD=means_CD,
                first_row=first_row,
                length=prototype_length(parent),
                margin=margin,
                spread_C=spread_C,
                mesh=mesh,
            )
        )
        start += dim
    return views


def guides_of(parents: Sequence[Generation], device: torch.device) -> list[nn.Module]:
    """The parents' frozen backbones."""
    return [parent.load_backbone().requires_grad_(False).to(device) for parent in parents]
