"""A parent's frozen classifier, aligned to the new generation's identity table and cut to one rank's part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.generation import Generation
from pipeline.identities import Alignment, IdentityTable, align
from pipeline.model.backbones import BackboneConfig
from pipeline.model.heads import Head
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import row_range

Rows = npt.NDArray[np.int64]
LENGTH_ROWS = 4096  # prototypes of a parent whose mean length stands for all


def parent_part(old: IdentityTable, new: IdentityTable, shard: int, shards: int) -> tuple[Rows, Rows]:
    """Which rows of the parent's classifier a rank holds, and the new row of each.

    The old prototype of an identity lies on the rank that holds its new row. Identities that are gone stay as
    negatives, spread evenly; their new rows lie past the table's end, where no label reaches.

    Returns:
        (K,) int64 rows of the parent's table, and (K,) int64 rows of the new one, ascending.
    """
    alignment = align(old, new)
    kept, new_rows = _kept(alignment, len(new), shard, shards)
    first, last = row_range(len(alignment.gone), shard, shards)
    return (
        np.concatenate([kept, alignment.gone[first:last]]),
        np.concatenate([new_rows, len(new) + np.arange(first, last, dtype=np.int64)]),
    )


def load_parent_head(parent: Generation, new: IdentityTable, mesh: ClassMesh, device: torch.device) -> Head:
    """Read a rank's part of a parent's classifier from its artefact; no rank ever holds the whole of it."""
    old_rows, new_rows = parent_part(parent.identities(), new, mesh.shard, mesh.shards)
    weight_CD = parent.read_classifier_rows(old_rows).to(device)
    return Head(parent.record.name, weight_CD, torch.from_numpy(new_rows).to(device), parent.record.margin)


def start_from(weight_CD: Tensor, parent: Generation, new: IdentityTable, mesh: ClassMesh) -> None:
    """Let a rank's new prototypes start where the parent's stand, in place.

    Identities that the parent did not know keep their fresh prototype, at the length of the parent's: the length
    sets how fast a normalised prototype turns. A larger new dimension gets the parent's values first; of a smaller one
    they are cut off.
    """
    kept, new_rows = _kept(align(parent.identities(), new), len(new), mesh.shard, mesh.shards)
    first_row, _ = row_range(len(new), mesh.shard, mesh.shards)
    weight_CD.mul_(prototype_length(parent) / weight_CD.norm(dim=1, keepdim=True))
    dim = min(weight_CD.shape[1], parent.record.embedding_dim)
    places = torch.from_numpy(new_rows - first_row).to(weight_CD.device)
    weight_CD[places, :dim] = parent.read_classifier_rows(kept)[:, :dim].to(weight_CD.device)


def start_backbone_from(network: nn.Module, config: BackboneConfig, parent: Generation) -> None:
    """Give a fresh backbone the parent's weights.

    Raises:
        ConfigError: the two are not of one architecture.
    """
    assert parent.record.backbone is not None, "methods that start from a parent refuse one without"
    here, there = (one.model_dump(exclude={"dropout"}) for one in (config, parent.record.backbone))
    if differing := [f"{key} ({there[key]} there, {here[key]} here)" for key in here if here[key] != there[key]]:
        raise ConfigError(
            f"the backbone is to start from the weights of {parent.record.name!r}, but differs from it in "
            f"{', '.join(differing)}; take the parent's backbone, or another compat.method"
        )
    network.load_state_dict(parent.load_backbone().state_dict())


def prototype_length(parent: Generation) -> float:
    """Mean length of a parent's prototypes, over the first ones: the same on every rank."""
    some = np.arange(min(parent.record.identities, LENGTH_ROWS), dtype=np.int64)
    return float(parent.read_classifier_rows(some).norm(dim=1).mean())


def _kept(alignment: Alignment, rows: int, shard: int, shards: int) -> tuple[Rows, Rows]:
    """Old rows of the identities whose new row is this rank's, and those new rows, ascending."""
    start, stop = row_range(rows, shard, shards)
    new_rows = alignment.new_rows[alignment.kept]
    inside = (new_rows >= start) & (new_rows < stop)
    return alignment.kept[inside], new_rows[inside]
