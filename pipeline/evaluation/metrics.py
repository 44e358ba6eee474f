"""Verification figures from scores: TAR@FAR and DET curves.

A pair's score is the cosine of its two embeddings. Products are summed in float64 and rounded to a multiple of
2^-24, which float32 holds exactly: a pair's score, and with it every tie, does not depend on the block in which
it happened to be computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CHUNK_PAIRS = 2_000_000  # about 30 MB of scores and masks at a time
STEPS = 2.0**24  # scores a unit apart; finer than float32 embeddings mean anything
# x + ROUNDING - ROUNDING is x to the nearest 1 / STEPS: so large a float64 has no finer digits.
ROUNDING = 1.5 * 2.0**52 / STEPS
# A power of two makes every bin edge of [-1, 1] exact in float32: counts at edges are counts, not estimates.
BINS = 2048
EDGES_B = np.linspace(-1.0, 1.0, BINS + 1, dtype=np.float32)


@dataclass(frozen=True)
class VerificationScores:
    """Scores of all compared pairs, the impostors' in a bounded form.

    Attributes:
        genuine_P: (P,) float32 cosines of the pairs of one identity, ascending.
        impostor_tail_T: (T,) float32, the T highest cosines of pairs of two identities, descending.
        impostor_histogram_B: (BINS,) int64, how many of all impostor scores lie in each of the equal bins of
            [-1, 1]; a bin holds its lower edge, the last one both. `verification` may count a score in the next higher
            bin if it lies closer than `exact.error_bound` below that bin: in under 1 % of a bin's width.
        impostors: number of impostor pairs, at least T.
        genuine_identity_P: (P,) int64, the identity of each genuine pair; None: not known, no resampling.
        tail_query_T: (T,) int64, the query's identity of each pair of the tail; None likewise.
        tail_gallery_T: (T,) int64, the gallery item's.
        doubled: every pair stands twice, one copy after the other: a self-test scores (i, j) as (j, i).
    """

    genuine_P: Float32
    impostor_tail_T: Float32
    impostor_histogram_B: Int64
    impostors: int
    genuine_identity_P: Int64 | None = None
    tail_query_T: Int64 | None = None
    tail_gallery_T: Int64 | None = None
    doubled: bool = False


def unit_rows(vectors_ND: npt.NDArray[np.floating], name: str) -> Float64:
    """Return the rows divided by their L2 norm, (N, D) float64.

    Args:
        vectors_ND: (N, D) embeddings.
        name: how an error calls them, e.g. "query".

    Raises:
        DataError: there is no row, or a row holds NaN or infinity, or is all zeros.
    """
    assert vectors_ND.ndim == 2, f"{name} embeddings have shape {vectors_ND.shape}, not (N, D)"
    if vectors_ND.size == 0:
        raise DataError(f"{name} embeddings are empty (shape {vectors_ND.shape}): nothing to evaluate")
    unit_ND = vectors_ND.astype(np.float64)
    norm_N = np.sqrt(np.einsum("nd,nd->n", unit_ND, unit_ND))
    bad_rows = np.flatnonzero(~np.isfinite(norm_N))
    if bad_rows.size:
        raise DataError(
            f"{name} embedding row {bad_rows[0]} holds NaN or infinity ({bad_rows.size} such rows of {norm_N.size}): "
            "embed again with a checkpoint that is finite"
        )
    zero_rows = np.flatnonzero(norm_N == 0)
    if zero_rows.size:
        raise DataError(
            f"{name} embedding row {zero_rows[0]} is all zeros ({zero_rows.size} such rows of {norm_N.size}) and has "
            "no direction: check the model's last layer"
        )
    unit_ND /= norm_N[:, None]
    return unit_ND


def score_blocks(unit_QD: Float64, unit_GD: Float64, chunk_pairs: int = CHUNK_PAIRS) -> Iterator[tuple[slice, Float32]]:
    """Yield (query rows, their (rows, G) float32 cosines), top to bottom."""
    assert unit_QD.shape[1] == unit_GD.shape[1], f"dimensions differ: {unit_QD.shape[1]} and {unit_GD.shape[1]}"
    rows = max(1, chunk_pairs // len(unit_GD))
    for start in range(0, len(unit_QD), rows):
        block = slice(start, min(start + rows, len(unit_QD)))
        scores_qG = unit_QD[block] @ unit_GD.T
        yield block, rounded(scores_qG).astype(np.float32)


def rounded(scores: Float64) -> Float64:
    """Round in place to multiples of 1 / STEPS, half to even.

    Rounding to float32 alone is relative: what cancels to 0 would stay as 1e-17 or -1e-17, at random.
    """
    scores += ROUNDING
    scores -= ROUNDING
    return scores


def allowed(rate: float, count: int) -> int:
    """How many of `count` may pass at a rate: its floor, the rate being the decimal that it is written as."""
    return int(Decimal(repr(float(rate))) * count)


def threshold_at_far(scores: VerificationScores, far: float) -> float:
    """Return the smallest float32 threshold t such that (impostors with score >= t) / impostors <= far.

    With n impostors, at most k = floor(far * n) of them may be accepted (far as the decimal it is written as, so
    that 0.29 of 100 is 29). The threshold is therefore the float32 next above the (k+1)-th highest impostor
    score; -inf where k = n. Ties: impostors that share the (k+1)-th score are all rejected, and so is a genuine
    pair with that score, so the share accepted may be below `far` but never above it.

    Raises:
        DataError: k is 0, because there are too few impostors; or the kept tail does not reach k + 1.
    """
    assert 0 < far <= 1, f"FAR {far} is not in (0, 1]"
    accepted = allowed(far, scores.impostors)
    if accepted == 0:
        needed = int((1 / Decimal(repr(float(far)))).to_integral_value(ROUND_CEILING))
        raise DataError(
            f"FAR {far:g} needs at least {needed} impostor pairs, but the test set gives {scores.impostors}: "
            "add test images or ask for a higher FAR"
        )
    if accepted == scores.impostors:
        return -np.inf
    if accepted >= len(scores.impostor_tail_T):
        raise DataError(
            f"FAR {far:g} over {scores.impostors} impostor pairs needs their {accepted + 1} highest scores, but "
            f"{len(scores.impostor_tail_T)} were kept: call verification with tail={accepted + 1} or more"
        )
    return float(np.nextafter(scores.impostor_tail_T[accepted], np.float32(np.inf)))


def tar_at_far(scores: VerificationScores, far: float) -> float:
    """True accept rate: the share of genuine pairs with score >= `threshold_at_far(scores, far)`.

    Raises:
        DataError: as `threshold_at_far`.
    """
    below = np.searchsorted(scores.genuine_P, np.float32(threshold_at_far(scores, far)), side="left")
    return float(1 - below / scores.genuine_P.size)


def far_at_threshold(scores: VerificationScores, threshold: float) -> float:
    """False accept rate: the share of impostors with score >= `threshold`.

    Exact down to the end of the kept tail; below it the histogram's counts are interpolated within a bin.
    """
    tail_T = scores.impostor_tail_T
    if len(tail_T) == scores.impostors or threshold > tail_T[-1]:
        return float(np.searchsorted(-tail_T, -np.float32(threshold), side="right") / scores.impostors)
    at_edge_B = np.append(np.cumsum(scores.impostor_histogram_B[::-1])[::-1], 0)
    return float(np.interp(threshold, EDGES_B, at_edge_B) / scores.impostors)


def det_curve(scores: VerificationScores, points: int = 200) -> tuple[Float64, Float64]:
    """Detection error trade-off: (far, frr) of `det_points`."""
    return det_points(scores, points)[:2]


def det_points(scores: VerificationScores, points: int = 200) -> tuple[Float64, Float64, Float32]:
    """Detection error trade-off: far ascending from about 1 / impostors to 1, frr, and the threshold of each point.

    At most `points` of them, each exact at its own threshold: far is the share of impostors >= it, frr the share of
    genuine pairs below it. Thresholds are those of evenly spaced log FARs within the kept tail; beyond it they fall
    on the histogram's bin edges. The first far may be 0: with equal
    scores at the top, or with a tail so short that the histogram's top bin decides.
    """
    assert points >= 2
    accepted_K = np.unique(np.geomspace(1, scores.impostors, points).round().astype(np.int64))
    tail_T = scores.impostor_tail_T
    inside_K = accepted_K[accepted_K < len(tail_T)]
    limit_K = tail_T[inside_K]
    above_K = np.searchsorted(-tail_T, -limit_K, side="left")
    # Impostors at or above each lower bin edge, then above everything.
    at_edge_B = np.append(np.cumsum(scores.impostor_histogram_B[::-1])[::-1], 0)
    bin_K = np.searchsorted(-at_edge_B, -accepted_K[len(inside_K) :], side="left")
    edge_B = np.append(EDGES_B[:-1], np.float32(np.inf))
    threshold_K = np.concatenate([np.nextafter(limit_K, np.float32(np.inf)), edge_B[bin_K]])
    count_K = np.concatenate([above_K, at_edge_B[bin_K]])
    # A coarse edge just past the tail can accept fewer than the tail's last point: keep the curve in order.
    order_K = np.argsort(-threshold_K, kind="stable")
    far_K = count_K[order_K] / scores.impostors
    frr_K = np.searchsorted(scores.genuine_P, threshold_K[order_K], side="left") / scores.genuine_P.size
    return far_K.astype(np.float64), frr_K.astype(np.float64), threshold_K[order_K]
