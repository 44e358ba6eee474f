"""Verification (1:1) over listed pairs, as IJB-C's 15.66 million: scores, and TAR@FAR of both directions.

Listed pairs cover some rectangle of (left, right) rows densely, so they are scored by matrix products of blocks of the
rows that occur, and the listed entries are picked; where they are sparse, pair by pair (`exact.exact_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluation.exact import Integers, Rows, exact_scores
from pipeline.evaluation.impostors import BINS
from pipeline.evaluation.metrics import Float32, Int64, VerificationScores, allowed, tar_at_far

Bools = npt.NDArray[np.bool_]

CHUNK_PAIRS = 1 << 21  # 16 MiB of float64 cosines at a time
TAIL = 1_000_000  # impostor scores kept at least, for DET curves: 4 MB
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def score_pairs(left_ND: Float32, right_MD: Float32, pairs_P2: Integers, *, chunk_pairs: int = CHUNK_PAIRS) -> Float32:
    """Score listed pairs.

    Beyond the result it takes about 20 bytes a pair, `chunk_pairs` cosines and a few numbers a row.

    Args:
        left_ND: (N, D) float32 embeddings, any norm.
        right_MD: (M, D) float32 embeddings of the same or another generation, any norm.
        pairs_P2: (P, 2) rows of `left_ND` and of `right_MD`, in any order.
        chunk_pairs: the size of a block's rectangle.

    Returns:
        (P,) float32 cosines, summed in float64 and rounded to multiples of 2^-24.

    Raises:
        DataError: embeddings are empty or not finite, or no pair is listed.
    """
    assert left_ND.shape[1] == right_MD.shape[1], f"dimensions differ: {left_ND.shape[1]} and {right_MD.shape[1]}"
    assert pairs_P2.ndim == 2, f"pairs have shape {pairs_P2.shape}, not (P, 2)"
    assert pairs_P2.shape[1] == 2, f"pairs have shape {pairs_P2.shape}, not (P, 2)"
    assert chunk_pairs >= 1
    if not len(pairs_P2):
        raise DataError("no pair is listed: nothing to verify")
    left_L, row_P = _occurring(pairs_P2[:, 0], len(left_ND))
    right_R, column_P = _occurring(pairs_P2[:, 1], len(right_MD))
    left, right = Rows.of(left_ND, "left"), Rows.of(right_MD, "right")
    height = max(1, min(len(left_L), math.isqrt(chunk_pairs)))
    width = max(1, min(len(right_R), chunk_pairs // height))
    across = -(-len(right_R) // width)
    block_P, last = row_P // height * across + column_P // width, -(-len(left_L) // height) * across
    # Integers of 16 bits are sorted by radix, in a tenth of the time.
    order_P = np.argsort(block_P.astype(np.min_scalar_type(last)), kind="stable")
    edges_B = np.concatenate([[0], np.cumsum(np.bincount(block_P, minlength=last))])
    del block_P
    scores_P = np.empty(len(pairs_P2), np.float32)
    for block in np.flatnonzero(np.diff(edges_B)):
        listed_p = order_P[edges_B[block] : edges_B[block + 1]]
        top, side = block // across * height, block % across * width
        scores_P[listed_p] = exact_scores(
            left[left_L[top : top + height]],
            right[right_R[side : side + width]],
            row_P[listed_p] - top,
            column_P[listed_p] - side,
        )
    return scores_P


def _occurring(row_P: Integers, rows: int) -> tuple[Int64, Int64]:
    """Return the rows that occur, ascending, and each entry's place among them."""
    assert row_P.min() >= 0, f"row {row_P.min()} of {rows}"
    assert row_P.max() < rows, f"row {row_P.max()} of {rows}"
    occurs_N = np.zeros(rows, np.bool_)
    occurs_N[row_P] = True
    return np.flatnonzero(occurs_N), (np.cumsum(occurs_N) - 1)[row_P]


def verification_scores(scores_P: Float32, same_P: Bools, fars: Sequence[float] = FARS) -> VerificationScores:
    """Part scores into genuine and impostor ones, with a tail of impostors long enough for every FAR.

    Args:
        scores_P: (P,) float32 cosines.
        same_P: (P,) bool, the pair is of one identity.
        fars: false accept rates that will be asked for.

    Raises:
        DataError: no pair is of one identity, or none of two.
    """
    assert scores_P.shape == same_P.shape
    genuine_P, impostor_P = np.sort(scores_P[same_P]), scores_P[~same_P]
    for kind, found_P in (("one identity", genuine_P), ("two identities", impostor_P)):
        if not len(found_P):
            raise DataError(f"none of the {len(scores_P)} listed pairs is of {kind}: verification needs both kinds")
    tail = max([TAIL, *(allowed(far, len(impostor_P)) + 1 for far in fars)])
    histogram_B = np.histogram(impostor_P, BINS, (-1.0, 1.0))[0].astype(np.int64)
    count = len(impostor_P)
    if tail < count:
        impostor_P.partition(count - tail)
    tail_T = np.sort(impostor_P[-tail:])[::-1]
    return VerificationScores(genuine_P, tail_T, histogram_B, count)


def tar_at_fars(scores_P: Float32, same_P: Bools, fars: Sequence[float] = FARS) -> dict[float, float]:
    """Return FAR -> true accept rate, with the threshold of `metrics.threshold_at_far`.

    Raises:
        DataError: a kind of pair is missing, or there are too few impostors for a FAR.
    """
    scores = verification_scores(scores_P, same_P, fars)
    return {far: tar_at_far(scores, far) for far in fars}


@dataclass(frozen=True)
class BothDirections:
    """TAR at each FAR of a cross-test over listed pairs, whose two places are not alike.

    Attributes:
        new_first: FAR -> TAR with the new generation's embedding of a pair's first item, the old one's of its second.
        new_second: FAR -> TAR the other way round.
    """

    new_first: dict[float, float]
    new_second: dict[float, float]


def cross_verify(
    new_ND: Float32, old_ND: Float32, pairs_P2: Integers, same_P: Bools, fars: Sequence[float] = FARS
) -> BothDirections:
    """Verify listed pairs across two generations, in both directions.

    Args:
        new_ND: (N, D) float32 embeddings by the new generation, in the old one's dimension.
        old_ND: (N, D) float32 embeddings of the same items by the old generation.
        pairs_P2: (P, 2) rows.
        same_P: (P,) bool, the pair is of one identity.
        fars: false accept rates.

    Raises:
        DataError: as `score_pairs` and `tar_at_fars`.
    """
    assert new_ND.shape == old_ND.shape, f"embeddings of other items or dimensions: {new_ND.shape}, {old_ND.shape}"
    return BothDirections(
        new_first=tar_at_fars(score_pairs(new_ND, old_ND, pairs_P2), same_P, fars),
        new_second=tar_at_fars(score_pairs(old_ND, new_ND, pairs_P2), same_P, fars),
    )
