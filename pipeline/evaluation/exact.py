"""Cosines that do not depend on the block in which they are computed, at the price of float32 products.

The score of a pair is its cosine summed in float64 and rounded to a multiple of 2^-24, as in `metrics`. Large products
are made in float32, which is twice as fast; `error_bound` says how far they may be off, and the few pairs for which
that matters are scored again by `exact_scores`. What is left to chance is a cosine within 1e-15 of the middle between
two multiples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluation.metrics import STEPS, Float32, Float64, Int64, rounded

Integers = npt.NDArray[np.integer]

DENSE = 32  # a pair fetched and multiplied by itself costs about as much as this many within one matrix product
ELEMENTS = 1 << 20  # values that are converted at a time: 8 MiB


@dataclass(frozen=True)
class Rows:
    """Embeddings and their lengths; converted only where they are used.

    Attributes:
        vectors_ND: (N, D) floats, any length.
        norm_N: (N,) float64 L2 norms, finite and positive.
    """

    vectors_ND: npt.NDArray[np.floating]
    norm_N: Float64

    @classmethod
    def of(cls, vectors_ND: npt.NDArray[np.floating], name: str) -> Rows:
        """Measure the rows.

        Args:
            vectors_ND: (N, D) embeddings.
            name: how an error calls them, e.g. "query".

        Raises:
            DataError: there is no row, or a row holds NaN or infinity, or is all zeros.
        """
        assert vectors_ND.ndim == 2, f"{name} embeddings have shape {vectors_ND.shape}, not (N, D)"
        if vectors_ND.size == 0:
            raise DataError(f"{name} embeddings are empty (shape {vectors_ND.shape}): nothing to evaluate")
        norm_N = np.empty(len(vectors_ND))
        for block in blocks(len(vectors_ND), max(1, ELEMENTS // vectors_ND.shape[1])):
            part_nD = vectors_ND[block].astype(np.float64)
            norm_N[block] = np.sqrt(np.einsum("nd,nd->n", part_nD, part_nD))
        for bad_N, what, remedy in (
            (~np.isfinite(norm_N), "holds NaN or infinity", "embed again with a checkpoint that is finite"),
            (norm_N == 0, "is all zeros and has no direction", "check the model's last layer"),
        ):
            if bad_N.any():
                raise DataError(
                    f"{name} embedding row {bad_N.argmax()} {what} ({bad_N.sum()} such rows of {len(bad_N)}): {remedy}"
                )
        return cls(vectors_ND, norm_N)

    def __len__(self) -> int:
        return len(self.norm_N)

    def __getitem__(self, rows: slice | Integers) -> Rows:
        return Rows(self.vectors_ND[rows], self.norm_N[rows])

    def unit(self) -> Float64:
        """Return the rows divided by their norms, (N, D) float64."""
        unit_ND = self.vectors_ND.astype(np.float64)
        unit_ND /= self.norm_N[:, None]
        return unit_ND


def blocks(count: int, size: int) -> Iterator[slice]:
    """Cut range(count) into slices of `size`, the last one shorter."""
    assert size >= 1
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def error_bound(dim: int) -> float:
    """How far a float32 product of float32 unit rows may lie from the pair's score.

    A sum of D products, in whatever order, is off by at most D u / (1 - D u) of the sum of their magnitudes, which is
    at most 1 here; u = 2^-24 is float32's unit roundoff. Rounding both operands adds 2 u, rounding the score u / 2; the
    rest is for limits that are themselves float32. (Higham, "Accuracy and Stability of Numerical Algorithms", Eq. 3.5.)
    """
    off = (dim + 6) / STEPS
    return off / (1 - off)


def exact_scores(left: Rows, right: Rows, row_P: Integers, column_P: Integers) -> Float32:
    """Score the pairs (left row, right row).

    Listed pairs that fill the rectangle are taken from one product of all rows; few ones are fetched.

    Args:
        left: L rows of dimension D.
        right: R rows of dimension D.
        row_P: (P,) rows of `left`.
        column_P: (P,) rows of `right`.

    Returns:
        (P,) float32 cosines, multiples of 2^-24.
    """
    if not len(row_P):
        return np.empty(0, np.float32)
    if len(row_P) * DENSE >= len(left) * len(right):
        return rounded((left.unit() @ right.unit().T)[row_P, column_P]).astype(np.float32)
    scores_P = np.empty(len(row_P), np.float32)
    for block in blocks(len(row_P), max(1, ELEMENTS // left.vectors_ND.shape[1])):
        scores_P[block] = rounded(
            np.einsum("pd,pd->p", left[row_P[block]].unit(), right[column_P[block]].unit(), optimize=False)
        )
    return scores_P


def ranges(start_N: Int64, count_N: Int64) -> tuple[Int64, Int64]:
    """Concatenate the ranges start, start + 1, ..., start + count - 1; returns (whose range, value), each (sum,)."""
    owner_P = np.repeat(np.arange(len(count_N)), count_N)
    first_N = np.cumsum(count_N) - count_N
    return owner_P, np.arange(len(owner_P)) - first_N[owner_P] + start_N[owner_P]
