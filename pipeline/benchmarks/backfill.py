"""Rank-1 while a gallery moves to another generation, by order; its scores on one scale, and as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.backfill.curve import Judge
from pipeline.backfill.moving import StoredVectors
from pipeline.backfill.order import OrderConfig, keys_in_order
from pipeline.benchmarks.measure import machine
from pipeline.evaluation.exact import blocks
from pipeline.gallery.index import IndexConfig, Segment
from pipeline.gallery.scale import Scale
from pipeline.schema import Config
from pipeline.search import Gallery
from pipeline.stamp import Stamp
from pipeline.vectors import Vectors, read_vectors, vector_files

ORDERS: tuple[Literal["uncertainty", "random"], ...] = ("uncertainty", "random")


class BackfillBenchmark(Config):
    """What is measured."""

    gallery: Path = Field(Path("gallery-v1"), description="vectors of the older generation (jobs/embed.py)")
    vectors: Path = Field(Path("gallery-v2"), description="of the same keys, by the newer one")
    queries: Path = Field(Path("queries-v2"), description="vectors of the newer one, with identities")
    batches: int = Field(20, ge=1, description="that the gallery moves in")
    seed: int = Field(0, ge=0, description="of the random order")


class Raw(Gallery):
    """A gallery whose cosines stay as they are."""

    @cached_property
    def scales(self) -> Mapping[Stamp, Scale]:
        """None."""
        return {}


def measure_backfill(config: BackfillBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file.

    `area` is the mean of rank-1 over the shares of the gallery that have moved, by the trapezoidal rule.

    Raises:
        DataError: vectors cannot be read, or a key has no new one.
    """
    old, queries = (read_vectors(vector_files(place)) for place in (config.gallery, config.queries))
    new = StoredVectors.read(config.vectors)
    new.check(old.keys)
    rank1: dict[str, dict[str, list[float]]] = {}
    for order in ORDERS:
        keys = keys_in_order(Gallery.of([old]), new.stamp, OrderConfig(order=order, seed=config.seed))
        moving = new(keys)
        rank1[order] = {}
        for name, kind in (("scaled", Gallery), ("raw", Raw)):
            progress(f"{order}, {name}")
            rank1[order][name] = _curve(kind.of([old]), moving, queries, config.batches)
    shares = np.linspace(0, 1, len(rank1[ORDERS[0]]["raw"])).tolist()
    return {
        "benchmark": "backfill",
        "generations": [old.stamp.generation, new.stamp.generation],
        "keys": len(old),
        "queries": len(queries),
        "shares": shares,
        "rank1": rank1,
        "area": {
            order: {name: float(np.trapezoid(curve, shares)) for name, curve in curves.items()}
            for order, curves in rank1.items()
        },
        "machine": machine(torch.device("cpu")),
    }


def _curve(gallery: Gallery, moving: Vectors, queries: Vectors, batches: int) -> list[float]:
    judge = Judge(queries, gallery)
    curve = [judge.rank1(gallery)]
    for block in blocks(len(moving), -(-len(moving) // batches)):
        part = moving.take(np.arange(block.start, block.stop))
        gallery = gallery.with_part(Segment.of(part, IndexConfig()))
        curve.append(judge.rank1(gallery))
    return curve
