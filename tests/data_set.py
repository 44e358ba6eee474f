"""A small data set made without Ray; its images are noise, which nobody decodes."""

from pathlib import Path

import numpy as np

from pipeline.data.finishing import write_data_set
from pipeline.data.manifest import Manifest
from pipeline.data.sources import Sample
from pipeline.identities import IdentityTable

KEYS = tuple(f"id-{number}" for number in range(5))


def make_data_set(folder: Path, shards: int = 4, samples: int = 3, image_bytes: int = 5000) -> Manifest:
    """Write shards of about `samples * (image_bytes + 3000)` bytes, all of one size."""
    rng, table = np.random.default_rng(1), IdentityTable(KEYS)
    numbers = (range(shard * samples, (shard + 1) * samples) for shard in range(shards))
    made = ((Sample(f"s{n:06d}", rng.bytes(image_bytes), "jpg", KEYS[n % 5], {}) for n in part) for part in numbers)
    return write_data_set(folder, "made by hand", table, made)
