"""Retrieval and verification figures from embeddings: rank-k, TAR@FAR and DET curves.

A pair's score is the cosine of its two embeddings. Products are summed in float64 and rounded to a multiple of
2^-24, which float32 holds exactly: a pair's score, and with it every tie, does not depend on the block in which
it happened to be computed. Work goes in blocks of query rows; memory is bounded by `chunk_pairs`, the
embeddings and the kept tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CHUNK_PAIRS = 2_000_000  # about 30 MB of scores and masks at a time
TAIL = 1_000_000  # impostor scores kept exactly by default: 4 MB
# A power of two makes every bin edge of [-1, 1] exact in float32: counts at edges are counts, not estimates.
BINS = 2048
STEPS = 2.0**24  # scores a unit apart; finer than float32 embeddings mean anything
EDGES_B = np.linspace(-1.0, 1.0, BINS + 1, dtype=np.float32)


@dataclass(frozen=True)
class VerificationScores:
    """Scores of all compared pairs, the impostors' in a bounded form.

    Attributes:
        genuine_P: (P,) float32 cosines of the pairs of one identity, ascending.
        impostor_tail_T: (T,) float32, the T highest cosines of pairs of two identities, descending.
        impostor_histogram_B: (BINS,) int64, how many of all impostor scores lie in each of the equal bins of
            [-1, 1]; a bin holds its lower edge, the last one both.
        impostors: number of impostor pairs, at least T.
    """

    genuine_P: Float32
    impostor_tail_T: Float32
    impostor_histogram_B: Int64
    impostors: int


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


def _score_blocks(unit_QD: Float64, unit_GD: Float64, chunk_pairs: int) -> Iterator[tuple[slice, Float32]]:
    """Yield (query rows, their (rows, G) float32 cosines), top to bottom."""
    assert unit_QD.shape[1] == unit_GD.shape[1], f"dimensions differ: {unit_QD.shape[1]} and {unit_GD.shape[1]}"
    rows = max(1, chunk_pairs // len(unit_GD))
    for start in range(0, len(unit_QD), rows):
        block = slice(start, min(start + rows, len(unit_QD)))
        scores_qG = unit_QD[block] @ unit_GD.T
        # Rounding to float32 alone is relative: what cancels to 0 would stay as 1e-17 or -1e-17, at random.
        scores_qG *= STEPS
        np.rint(scores_qG, out=scores_qG)
        scores_qG /= STEPS
        yield block, scores_qG.astype(np.float32)


def rank_k(
    query_QD: Float32,
    query_identity_Q: Int64,
    gallery_GD: Float32,
    gallery_identity_G: Int64,
    ks: Sequence[int] = (1,),
    *,
    chunk_pairs: int = CHUNK_PAIRS,
) -> dict[int, float]:
    """Closed-set identification: share of queries whose k nearest gallery items hold their identity.

    Queries whose identity is not in the gallery are left out. Ties are broken against the query: an item of
    another identity with the same score as the query's best mate stands before it. So a model that gives every
    image one embedding scores 0, not 1.

    Args:
        query_QD: (Q, D) float32 embeddings, any norm.
        query_identity_Q: (Q,) int64 identity rows.
        gallery_GD: (G, D) float32 embeddings, any norm.
        gallery_identity_G: (G,) int64 identity rows of the same table.
        ks: ranks asked for, each at least 1; a rank beyond G holds for every query.
        chunk_pairs: pairs scored at a time.

    Returns:
        k -> share in [0, 1].

    Raises:
        DataError: embeddings are empty or not finite, or no query's identity is in the gallery.
    """
    assert len(query_QD) == len(query_identity_Q)
    assert len(gallery_GD) == len(gallery_identity_G)
    assert ks, "no rank asked for"
    assert min(ks) >= 1, f"ranks start at 1: {ks}"
    unit_QD, unit_GD = unit_rows(query_QD, "query"), unit_rows(gallery_GD, "gallery")
    enrolled_Q = np.isin(query_identity_Q, gallery_identity_G)
    if not enrolled_Q.any():
        raise DataError(
            f"none of the {len(query_QD)} queries has its identity among the {len(gallery_GD)} gallery items: "
            "enrol the queries' identities"
        )
    unit_QD, identity_Q = unit_QD[enrolled_Q], query_identity_Q[enrolled_Q]
    ahead_Q = np.empty(len(unit_QD), np.int64)
    for block, scores_qG in _score_blocks(unit_QD, unit_GD, chunk_pairs):
        mate_qG = identity_Q[block, None] == gallery_identity_G[None, :]
        best_mate_q = np.max(scores_qG, axis=1, where=mate_qG, initial=-np.inf)
        ahead_Q[block] = np.count_nonzero((scores_qG >= best_mate_q[:, None]) & ~mate_qG, axis=1)
    return {k: float(np.mean(ahead_Q < k)) for k in ks}


class _Impostors:
    """Keeps the `tail` highest of a stream of scores, a histogram of all, and their number."""

    def __init__(self, tail: int) -> None:
        assert tail >= 1
        self.tail = tail
        self.count = 0
        self.histogram_B = np.zeros(BINS, np.int64)
        self._kept: list[Float32] = []
        self._size = 0
        self._floor = np.float32(-np.inf)  # once the tail is full, no score below it can enter

    def add(self, scores_P: Float32) -> None:
        self.count += scores_P.size
        self.histogram_B += np.histogram(scores_P, BINS, (-1.0, 1.0))[0]
        high_P = scores_P[scores_P > self._floor]
        self._kept.append(high_P)
        self._size += high_P.size
        if self._size > 2 * self.tail:
            self._shrink()

    def _shrink(self) -> None:
        scores_P = np.concatenate(self._kept)
        if scores_P.size > self.tail:
            # A copy, or the slice would keep the whole partitioned array alive.
            scores_P = np.partition(scores_P, scores_P.size - self.tail)[-self.tail :].copy()
            self._floor = scores_P.min()
        self._kept, self._size = [scores_P], scores_P.size

    def highest(self) -> Float32:
        self._shrink()
        return np.sort(self._kept[0])[::-1]


def verification(
    query_QD: Float32,
    query_identity_Q: Int64,
    gallery_GD: Float32,
    gallery_identity_G: Int64,
    *,
    query_group_Q: Int64 | None = None,
    gallery_group_G: Int64 | None = None,
    same_images: bool = False,
    tail: int = TAIL,
    chunk_pairs: int = CHUNK_PAIRS,
) -> VerificationScores:
    """Score every ordered pair (query, gallery item) that the protocol compares.

    Args:
        query_QD: (Q, D) float32 embeddings, any norm.
        query_identity_Q: (Q,) int64 identity rows.
        gallery_GD: (G, D) float32 embeddings, any norm.
        gallery_identity_G: (G,) int64 identity rows of the same table.
        query_group_Q: (Q,) int64 typeface or camera codes; pairs within one group are not compared.
        gallery_group_G: (G,) int64, given exactly when query_group_Q is.
        same_images: row i of both sides is one image, so the pairs (i, i) are not compared; Q = G.
        tail: how many of the highest impostor scores to keep; FARs up to tail / impostors are exact.
        chunk_pairs: pairs scored at a time.

    Raises:
        DataError: embeddings are empty or not finite, or no genuine or no impostor pair is left.
    """
    assert len(query_QD) == len(query_identity_Q)
    assert len(gallery_GD) == len(gallery_identity_G)
    assert not same_images or len(query_QD) == len(gallery_GD), "same_images needs as many queries as gallery items"
    unit_QD, unit_GD = unit_rows(query_QD, "query"), unit_rows(gallery_GD, "gallery")
    impostors = _Impostors(tail)
    genuine: list[Float32] = []
    for block, scores_qG in _score_blocks(unit_QD, unit_GD, chunk_pairs):
        same_qG = query_identity_Q[block, None] == gallery_identity_G[None, :]
        compared_qG = _compared(block, query_group_Q, gallery_group_G, len(unit_GD), same_images)
        genuine.append(scores_qG[same_qG & compared_qG])
        impostors.add(scores_qG[~same_qG & compared_qG])
    genuine_P = np.sort(np.concatenate(genuine))
    for kind, count in (("genuine", genuine_P.size), ("impostor", impostors.count)):
        if not count:
            raise DataError(
                f"no {kind} pair among {len(query_QD)} x {len(gallery_GD)} images once pairs within one group are "
                f"left out: the test set needs {'two groups an identity' if kind == 'genuine' else 'two identities'}"
            )
    return VerificationScores(genuine_P, impostors.highest(), impostors.histogram_B, impostors.count)


def _compared(
    block: slice, query_group_Q: Int64 | None, gallery_group_G: Int64 | None, gallery: int, same_images: bool
) -> npt.NDArray[np.bool_]:
    """Which pairs of a block the protocol compares, (rows, G) or broadcastable to it."""
    assert (query_group_Q is None) == (gallery_group_G is None), "groups are given for both sides or for neither"
    compared_qG = np.ones((block.stop - block.start, gallery), np.bool_)
    if query_group_Q is not None and gallery_group_G is not None:
        assert len(gallery_group_G) == gallery
        compared_qG = query_group_Q[block, None] != gallery_group_G[None, :]
    if same_images:
        rows = np.arange(block.start, block.stop)
        compared_qG[rows - block.start, rows] = False
    return compared_qG


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
    exact_far = Decimal(repr(float(far)))
    accepted = int(exact_far * scores.impostors)
    if accepted == 0:
        needed = int((1 / exact_far).to_integral_value(ROUND_CEILING))
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


def det_curve(scores: VerificationScores, points: int = 200) -> tuple[Float64, Float64]:
    """Detection error trade-off: (far, frr), each (at most `points`,), far ascending from about 1 / impostors to 1.

    Each point is exact at its own threshold: far is the share of impostors >= it, frr the share of genuine pairs
    below it. Thresholds are those of evenly spaced log FARs within the kept tail; beyond it they fall on
    the histogram's bin edges. The first far may be 0: with equal
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
    return far_K.astype(np.float64), frr_K.astype(np.float64)
