"""Search of a gallery (1:N): what each query found, and rank-k, CMC, mAP and TPIR@FPIR from it.

`search` looks at every pair once, block by block; all figures come from its outcomes, so that a bootstrap only weighs
queries anew. Ties are broken against the query throughout: an item of another identity with a mate's score stands
before the mate, so that a model which gives every image one embedding scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Decimal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluation.ahead import Mates, Side, Standing, product_blocks
from pipeline.evaluation.exact import Integers, Rows
from pipeline.evaluation.metrics import Float32, Float64, Int64, allowed

Weights = npt.NDArray[np.integer] | npt.NDArray[np.floating]

CHUNK_PAIRS = 1 << 22  # 16 MiB of products, and masks of the rows that matter


@dataclass(frozen=True)
class SearchOutcomes:
    """What each query found.

    Attributes:
        identity_Q: (Q,) int64 identity rows.
        mated_Q: (Q,) bool, an item of the query's identity is compared with it.
        best_mate_Q: (Q,) float32 highest score of such an item; -inf without one.
        best_other_Q: (Q,) float32 highest score of an item of another identity; -inf without one.
        ahead_Q: (Q,) int64, items of other identities with at least best_mate's score; G without a mate.
        average_precision_Q: (Q,) float64 in [0, 1]; NaN without a mate, or if it was not asked for.
    """

    identity_Q: Int64
    mated_Q: npt.NDArray[np.bool_]
    best_mate_Q: Float32
    best_other_Q: Float32
    ahead_Q: Int64
    average_precision_Q: Float64

    def __len__(self) -> int:
        return len(self.identity_Q)


def search(
    query_QD: Float32,
    query_identity_Q: Int64,
    gallery_GD: Float32,
    gallery_identity_G: Int64,
    *,
    query_group_Q: Int64 | None = None,
    gallery_group_G: Int64 | None = None,
    average_precision: bool = True,
    chunk_pairs: int = CHUNK_PAIRS,
) -> SearchOutcomes:
    """Search the gallery with every query.

    Memory is bounded by `chunk_pairs`, a few numbers a row and, for some of the queries at a time, a few a mate. The
    outcome does not depend on `chunk_pairs` (see `exact`).

    Args:
        query_QD: (Q, D) float32 embeddings, any norm.
        query_identity_Q: (Q,) int64 identity rows.
        gallery_GD: (G, D) float32 embeddings, any norm.
        gallery_identity_G: (G,) int64 identity rows of the same table.
        query_group_Q: (Q,) int64 typeface or camera codes; pairs within one group are not compared.
        gallery_group_G: (G,) int64, given exactly when query_group_Q is.
        average_precision: find where every mate stands, not only the best one.
        chunk_pairs: pairs scored at a time.

    Raises:
        DataError: embeddings are empty or not finite.
    """
    assert (query_group_Q is None) == (gallery_group_G is None), "groups are given for both sides or for neither"
    assert chunk_pairs >= 1
    query = Side(Rows.of(query_QD, "query"), query_identity_Q, query_group_Q)
    gallery = Side(Rows.of(gallery_GD, "gallery"), gallery_identity_G, gallery_group_G)
    assert query_QD.shape[1] == gallery_GD.shape[1], f"dimensions differ: {query_QD.shape[1]}, {gallery_GD.shape[1]}"
    order_G = np.argsort(gallery_identity_G, kind="stable")
    identity_G = gallery_identity_G[order_G]
    parts = [
        _search_block(query.part(block), gallery, order_G, identity_G, average_precision, chunk_pairs)
        for block in _query_blocks(query_identity_Q, identity_G, chunk_pairs)
    ]
    joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts])
              for field in fields(SearchOutcomes)}  # fmt: skip
    return SearchOutcomes(**joined)


def _query_blocks(query_identity_Q: Integers, identity_G: Integers, chunk_pairs: int) -> Iterator[slice]:
    """Cut the queries into blocks of a bounded number of rows, and of mates, but of one query at least."""
    # Tall blocks: converting an item is a cost that all the rows of a block share.
    rows = max(1, math.isqrt(4 * chunk_pairs))
    mates_Q = np.searchsorted(identity_G, query_identity_Q, "right") - np.searchsorted(identity_G, query_identity_Q)
    total_Q = np.cumsum(mates_Q)
    start = 0
    while start < len(total_Q):
        before = total_Q[start - 1] if start else 0
        stop = int(np.searchsorted(total_Q, before + chunk_pairs, side="right"))
        stop = min(max(stop, start + 1), start + rows)
        yield slice(start, stop)
        start = stop


def _search_block(
    query: Side, gallery: Side, order_G: Int64, identity_G: Integers, average_precision: bool, chunk_pairs: int
) -> SearchOutcomes:
    queries, columns = len(query.rows), max(1, chunk_pairs // len(query.rows))
    mates = Mates.find(query, gallery, order_G, identity_G)
    scores_P = mates.scores(query, gallery, columns)
    by_row_P = np.lexsort((scores_P, mates.row_P))
    row_L, score_L = mates.row_P[by_row_P], scores_P[by_row_P]
    is_best_L = np.diff(row_L, append=queries) > 0
    kept_L = slice(None) if average_precision else is_best_L
    standing = Standing(row_L[kept_L], score_L[kept_L], queries, query.rows.vectors_ND.shape[1])
    for block, scores_qg in product_blocks(query, gallery, mates, columns):
        standing.add(scores_qg, query.rows, gallery.rows[block])
    mated_q = np.zeros(queries, np.bool_)
    mated_q[row_L] = True
    best_mate_q = np.full(queries, -np.inf, np.float32)
    best_mate_q[mated_q] = score_L[is_best_L]
    ahead_q = np.full(queries, len(gallery.rows))
    ahead_q[mated_q] = standing.ahead_L[is_best_L[kept_L]]
    precision_q = np.full(queries, np.nan)
    if average_precision:
        precision_q[mated_q] = _average_precision(standing.row_L, standing.ahead_L, queries)[mated_q]
    return SearchOutcomes(
        query.identity_N.astype(np.int64), mated_q, best_mate_q, standing.best_other_q, ahead_q, precision_q
    )


def _average_precision(row_L: Int64, ahead_L: Int64, queries: int) -> Float64:
    """Mean over a query's mates of (mates up to this one) / (items up to this one); (queries,), NaN without a mate.

    Mates come row by row, the worst first.
    """
    count_q = np.bincount(row_L, minlength=queries)
    nth_L = np.cumsum(count_q)[row_L] - np.arange(len(row_L))
    sum_q = np.bincount(row_L, weights=nth_L / (nth_L + ahead_L), minlength=queries)
    mean_q: Float64 = np.divide(sum_q, count_q, out=np.full(queries, np.nan), where=count_q > 0)
    return mean_q


def _weights(outcomes: SearchOutcomes, weight_Q: Weights | None) -> Float64:
    if weight_Q is None:
        return np.ones(len(outcomes))
    assert weight_Q.shape == (len(outcomes),), f"{weight_Q.shape} weights of {len(outcomes)} queries"
    assert (weight_Q >= 0).all(), "weights are counts"
    assert (weight_Q == np.rint(weight_Q)).all(), "weights are counts"
    return weight_Q.astype(np.float64)


def _mated_weights(outcomes: SearchOutcomes, weight_Q: Weights | None) -> Float64:
    """Weights of the mated queries, 0 for the others.

    Raises:
        DataError: all of them are 0.
    """
    mated_Q = np.where(outcomes.mated_Q, _weights(outcomes, weight_Q), 0.0)
    if not mated_Q.any():
        raise DataError(
            f"none of the {len(outcomes)} queries has a mate in the gallery (its identity, in another group): "
            "enrol the queries' identities"
        )
    return mated_Q


def rank_k(outcomes: SearchOutcomes, ks: Sequence[int], weight_Q: Weights | None = None) -> dict[int, float]:
    """Closed-set identification: share of mated queries whose k nearest items hold a mate.

    Args:
        outcomes: of a search.
        ks: ranks asked for, each at least 1; a rank beyond G holds for every query.
        weight_Q: (Q,) how often each query counts; none: once.

    Returns:
        k -> share in [0, 1].

    Raises:
        DataError: no query has a mate.
    """
    assert ks, "no rank asked for"
    assert min(ks) >= 1, f"ranks start at 1: {ks}"
    mated_Q = _mated_weights(outcomes, weight_Q)
    return {k: float(mated_Q[outcomes.ahead_Q < k].sum() / mated_Q.sum()) for k in ks}


def cmc(outcomes: SearchOutcomes, depth: int, weight_Q: Weights | None = None) -> Float64:
    """Cumulative match characteristic: rank-1, ..., rank-`depth`, (depth,) shares in [0, 1].

    Raises:
        DataError: no query has a mate.
    """
    assert depth >= 1
    mated_Q = _mated_weights(outcomes, weight_Q)
    first_D = np.bincount(np.minimum(outcomes.ahead_Q, depth), weights=mated_Q, minlength=depth + 1)
    shares_D: Float64 = np.cumsum(first_D)[:depth] / mated_Q.sum()
    return shares_D


def mean_average_precision(outcomes: SearchOutcomes, weight_Q: Weights | None = None) -> float:
    """Mean over the mated queries of their average precision, in [0, 1].

    Average precision is the mean of the precision at each mate, without interpolation.

    Raises:
        DataError: no query has a mate.
    """
    mated_Q = _mated_weights(outcomes, weight_Q)
    precision_Q = outcomes.average_precision_Q[outcomes.mated_Q]
    assert not np.isnan(precision_Q).any(), "search was not asked for average precision"
    return float(precision_Q @ mated_Q[outcomes.mated_Q] / mated_Q.sum())


def threshold_at_fpir(outcomes: SearchOutcomes, fpir: float, weight_Q: Weights | None = None) -> float:
    """Return the smallest float32 threshold t such that at most `fpir` of the non-mated queries find an item >= t.

    Of n non-mated queries at most k = floor(fpir * n) may find one (fpir as the decimal it is written as); t is next
    above the highest score that would admit more than k. -inf where all may.
    Source: Grother and Ngan, "Face Recognition Vendor Test: Performance of Face Identification Algorithms", NIST
    IR 8009, 2014: false positive identification rate.

    Raises:
        DataError: k is 0, because there are too few non-mated queries.
    """
    assert 0 < fpir <= 1, f"FPIR {fpir} is not in (0, 1]"
    weight_N = _weights(outcomes, weight_Q)[~outcomes.mated_Q]
    total = int(weight_N.sum())
    accepted = allowed(fpir, total)
    if accepted == 0:
        needed = int((1 / Decimal(repr(float(fpir)))).to_integral_value(ROUND_CEILING))
        raise DataError(
            f"FPIR {fpir:g} needs at least {needed} queries whose identity is not enrolled, but the test set gives "
            f"{total}: add {needed - total} or ask for a higher FPIR"
        )
    score_N = outcomes.best_other_Q[~outcomes.mated_Q]
    descending_N = np.argsort(-score_N, kind="stable")
    # The first query that would be one too many, and with it all that share its score, stay below.
    place = int(np.searchsorted(np.cumsum(weight_N[descending_N]), accepted, side="right"))
    if place == len(score_N):
        return -np.inf
    return float(np.nextafter(score_N[descending_N[place]], np.float32(np.inf)))


def tpir_at_fpir(outcomes: SearchOutcomes, fpir: float, weight_Q: Weights | None = None) -> float:
    """Open-set identification: share of mated queries whose best mate comes first and reaches the threshold of a FPIR.

    Source: as `threshold_at_fpir`; 1 - the false negative identification rate at rank 1.

    Raises:
        DataError: too few non-mated queries, or no mated one.
    """
    mated_Q = _mated_weights(outcomes, weight_Q)
    threshold = np.float32(threshold_at_fpir(outcomes, fpir, weight_Q))
    found_Q = (outcomes.ahead_Q == 0) & (outcomes.best_mate_Q >= threshold)
    return float(mated_Q[found_Q].sum() / mated_Q.sum())
