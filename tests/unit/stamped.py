"""Small stamped vectors of made-up generations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.schema import digest_json
from pipeline.stamp import Stamp, Verdict, Verdicts
from pipeline.vectors import Vectors


def stamp(generation: str, dim: int, family: str = "toys") -> Stamp:
    return Stamp(
        family=family,
        generation=generation,
        digest=digest_json(generation),
        dim=dim,
        normalised=False,
        preprocess="p",
    )


def stamped(
    generation: str,
    vectors: Sequence[Sequence[float]] | npt.NDArray[np.floating[Any]],
    keys: Sequence[str] | None = None,
    identities: Sequence[str] | None = None,
    family: str = "toys",
) -> Vectors:
    """Keys default to k000, k001, ...; identities to unknown."""
    vectors_ND = np.asarray(vectors, np.float32)
    keys = [f"k{place:03d}" for place in range(len(vectors_ND))] if keys is None else keys
    identities = [""] * len(keys) if identities is None else identities
    text = pa.large_string()
    return Vectors(
        stamp(generation, vectors_ND.shape[1], family), pa.array(keys, text), pa.array(identities, text), vectors_ND
    )


def held(*pairs: str) -> Verdicts:
    """Verdicts that the criterion holds: `held("v2/v1")`."""
    return Verdicts(
        Verdict(stamp(newer, 1).digest, stamp(older, 1).digest, True)
        for newer, older in (one.split("/") for one in pairs)
    )


def drawn(generation: str, count: int, dim: int, seed: int, first: int = 0) -> Vectors:
    """Random vectors of any length; keys k000 ... from `first` on."""
    vectors_ND = np.random.default_rng(seed).standard_normal((count, dim))
    return stamped(generation, vectors_ND, [f"k{first + place:03d}" for place in range(count)])
