"""A small test set, and noisy embeddings of it: generations share the true directions, so they are compatible."""

from typing import Any

import numpy as np

from pipeline.evaluation.compatibility import Embeddings

IDENTITIES, GROUPS = 12, 5
IDENTITY = np.repeat(np.arange(IDENTITIES), GROUPS)
GROUP = np.tile(np.arange(GROUPS), IDENTITIES)


def embed(generation: str, noise: float, dim: int = 6, seed: int = 0, **fields: Any) -> Embeddings:
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(99).standard_normal((IDENTITIES, 16))[IDENTITY]
    vectors = (centre + noise * random.standard_normal(centre.shape))[:, :dim].astype(np.float32)
    values: dict[str, Any] = {
        "vectors_ND": vectors,
        "identity_N": IDENTITY,
        "group_N": GROUP,
        "is_gallery_N": GROUP == 2,
        "generation": generation,
    }
    return Embeddings(**(values | fields))
