"""Which rank holds which rows, and how rows start: pure functions of sizes and seeds."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

INIT_BLOCK_ROWS = 4096  # rows drawn from one counter-based stream


def row_range(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of rank `rank`: equal ceil(rows / world_size) parts, the last ones shorter or empty.

    This is the rule of `torch.chunk` and of DTensor's `Shard(0)`, so that checkpoints can be resharded by torch.
    """
    part = -(-rows // world_size)
    return min(rank * part, rows), min((rank + 1) * part, rows)


def batch_parts(global_batch: int, world_size: int) -> list[int]:
    """Samples each rank takes of a global batch; they differ by one at most, and sum to `global_batch`."""
    edges = [rank * global_batch // world_size for rank in range(world_size + 1)]
    return [stop - start for start, stop in pairwise(edges)]


def initial_rows(start: int, stop: int, dim: int, seed: int, std: float = 0.01) -> Tensor:
    """Draw rows [start, stop) of a (rows, dim) normal matrix, each row the same at any world size.

    Rows come in blocks of INIT_BLOCK_ROWS from a Philox stream keyed by (seed, block), so that a rank draws only
    the blocks that it needs, and no two ranks ever start with the same rows.
    """
    out = torch.empty(stop - start, dim)
    for block in range(start // INIT_BLOCK_ROWS, -(-stop // INIT_BLOCK_ROWS)):
        first = block * INIT_BLOCK_ROWS
        stream = np.random.Generator(np.random.Philox(key=[seed, block]))
        rows = stream.standard_normal((INIT_BLOCK_ROWS, dim), dtype=np.float32)
        lo, hi = max(start, first), min(stop, first + INIT_BLOCK_ROWS)
        out[lo - start : hi - start] = torch.from_numpy(rows[lo - first : hi - first])
    return out.mul_(std)
