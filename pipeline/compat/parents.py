"""A parent's frozen classifier, aligned to the new generation's identity table and cut to one rank's part."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from pipeline.generation import Generation
from pipeline.identities import IdentityTable, align
from pipeline.model.heads import Head
from pipeline.model.rows import row_range
from pipeline.schema import Config

Rows = npt.NDArray[np.int64]


class CompatConfig(Config):
    """How a generation is held to its parents."""

    method: Literal["bct", "independent"] = Field(
        "bct",
        description="bct: the influence loss on the parents' classifiers (Shen et al. 2020, Eq. 8, T_old); "
        "independent: no tie, the paragon",
    )
    weight: float = Field(1.0, ge=0, description="lambda, the factor on each parent's influence loss")


def parent_part(old: IdentityTable, new: IdentityTable, rank: int, world_size: int) -> tuple[Rows, Rows]:
    """Which rows of the parent's classifier a rank holds, and the new row of each.

    The old prototype of an identity lies on the rank that holds its new row. Identities that are gone stay as
    negatives, spread evenly; their new rows lie past the table's end, where no label reaches.

    Returns:
        (K,) int64 rows of the parent's table, and (K,) int64 rows of the new one, ascending.
    """
    alignment = align(old, new)
    start, stop = row_range(len(new), rank, world_size)
    kept = alignment.kept
    new_rows = alignment.new_rows[kept]
    inside = (new_rows >= start) & (new_rows < stop)
    first, last = row_range(len(alignment.gone), rank, world_size)
    return (
        np.concatenate([kept[inside], alignment.gone[first:last]]),
        np.concatenate([new_rows[inside], len(new) + np.arange(first, last, dtype=np.int64)]),
    )


def load_parent_head(parent: Generation, new: IdentityTable, rank: int, world_size: int) -> Head:
    """Read a rank's part of a parent's classifier from its artefact; no rank ever holds the whole of it."""
    old_rows, new_rows = parent_part(parent.identities(), new, rank, world_size)
    weight_CD = parent.read_classifier_rows(old_rows)
    return Head(parent.record.name, weight_CD, torch.from_numpy(new_rows), parent.record.margin)
