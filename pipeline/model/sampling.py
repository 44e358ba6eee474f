"""Which prototypes take part in a step: Partial FC's negatives (An et al., CVPR 2022), by counting instead of drawing.

A row takes part if a hash of (seed, step, row) falls below the rate: no state, the same rows at any number of ranks and
after a resume, and no two ranks ever alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ROWS = 1 << 20  # hashed at once
BITS = 62


def sampled(rows_C: Tensor | range, rate: float, seed: int, step: int, device: torch.device | None = None) -> Tensor:
    """(C,) bool: whether each row takes part in step `step`, each with probability `rate`."""
    limit = int(rate * (1 << BITS))
    stream = _mix(torch.tensor([seed, step]))
    key = int(_mix(stream[:1] ^ (stream[1:] << 1)))
    chosen_C = torch.empty(len(rows_C), dtype=torch.bool, device=device)
    for first in range(0, len(rows_C), BLOCK_ROWS):
        part = rows_C[first : first + BLOCK_ROWS]
        block_N = torch.arange(part.start, part.stop, device=device) if isinstance(part, range) else part
        hash_N = _shift(_mix(_mix(block_N) ^ key), 64 - BITS)
        chosen_C[first : first + len(block_N)] = hash_N < limit
    return chosen_C


def most_sampled(rows: int, rate: float) -> int:
    """Upper bound of the rows that a step samples out of `rows`: exceeded less than once in 10^15 steps."""
    return min(rows, math.ceil(rate * rows + 8 * math.sqrt(rate * (1 - rate) * rows)) + 32)


def _mix(value_N: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on int64 with wrap-around: a bijection that scatters."""
    value_N = value_N + _signed(0x9E3779B97F4A7C15)
    value_N = (value_N ^ _shift(value_N, 30)) * _signed(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ _shift(value_N, 27)) * _signed(0x94D049BB133111EB)
    return value_N ^ _shift(value_N, 31)


def _shift(value_N: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift brings in the sign."""
    return value_N >> bits & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
