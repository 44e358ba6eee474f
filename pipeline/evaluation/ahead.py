"""How many items of other identities stand before a query's mates: the inner part of `identification.search`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.exact import Integers, Rows, blocks, error_bound, exact_scores, ranges
from pipeline.evaluation.metrics import Float32, Float64, Int64

APART = 4.0  # cosines lie in [-1, 1], so row * APART + cosine sorts by row, then by cosine; exact in float64


@dataclass(frozen=True)
class Side:
    """One side of a search.

    Attributes:
        rows: N embeddings.
        identity_N: (N,) rows of one identity table.
        group_N: (N,) codes within which pairs are not compared, or None.
    """

    rows: Rows
    identity_N: Integers
    group_N: Integers | None

    def __post_init__(self) -> None:
        assert self.identity_N.shape == (len(self.rows),)
        assert self.group_N is None or self.group_N.shape == (len(self.rows),)

    def part(self, block: slice) -> Side:
        """Return some of the rows."""
        return Side(self.rows[block], self.identity_N[block], None if self.group_N is None else self.group_N[block])


@dataclass(frozen=True)
class Mates:
    """The pairs of one identity of a block of queries, in the order of the gallery.

    Attributes:
        row_P: (P,) int64 query rows within the block.
        item_P: (P,) int64 gallery rows, ascending.
    """

    row_P: Int64
    item_P: Int64

    @classmethod
    def find(cls, query: Side, gallery: Side, order_G: Int64, identity_G: Integers) -> Mates:
        """Look the queries' identities up in the gallery's, sorted as `identity_G` by `order_G`."""
        first_q = np.searchsorted(identity_G, query.identity_N, side="left")
        row_P, place_P = ranges(first_q, np.searchsorted(identity_G, query.identity_N, side="right") - first_q)
        item_P = order_G[place_P]
        if query.group_N is not None and gallery.group_N is not None:
            compared_P = query.group_N[row_P] != gallery.group_N[item_P]
            row_P, item_P = row_P[compared_P], item_P[compared_P]
        by_item_P = np.argsort(item_P, kind="stable")
        return cls(row_P[by_item_P], item_P[by_item_P])

    def within(self, block: slice) -> slice:
        """Which of the pairs have their item in a block of the gallery."""
        first, last = np.searchsorted(self.item_P, (block.start, block.stop))
        return slice(int(first), int(last))

    def scores(self, query: Side, gallery: Side, columns: int) -> Float32:
        """Score the pairs, (P,) float32."""
        scores_P = np.empty(len(self.row_P), np.float32)
        for block in blocks(len(gallery.rows), columns):
            here = self.within(block)
            scores_P[here] = exact_scores(
                query.rows, gallery.rows[block], self.row_P[here], self.item_P[here] - block.start
            )
        return scores_P


class Standing:
    """Where the mates of a block of queries stand among the items of other identities.

    Args:
        row_L: (L,) int64 query rows within the block, ascending.
        score_L: (L,) float32 scores of mates, ascending within a row.
        queries: rows of the block.
        dim: of the embeddings.

    Attributes:
        ahead_L: (L,) int64, items of other identities that score at least as high as the mate, of those shown so far.
        best_other_q: (queries,) float32, the highest score of such an item, -inf at first.
    """

    def __init__(self, row_L: Int64, score_L: Float32, queries: int, dim: int) -> None:
        self.row_L, self.score_L = row_L, score_L
        self.bound = np.float32(error_bound(dim))
        self.key_L = row_L * APART + score_L
        assert (np.diff(self.key_L) >= 0).all(), "mates are not in order"
        self.ahead_L = np.zeros(len(row_L), np.int64)
        self.best_other_q = np.full(queries, -np.inf, np.float32)
        # Between `under` and `over` float32 does not tell on which side of which mate an item stands.
        self.under_q, self.over_q = np.full((2, queries), np.inf, np.float32)
        self.under_q[row_L[::-1]] = score_L[::-1] - self.bound  # the last one written is the row's lowest
        self.over_q[row_L] = score_L + self.bound  # the row's highest

    def add(self, scores_qg: Float32, query: Rows, items: Rows) -> None:
        """Take a block of the gallery into account.

        Args:
            scores_qg: (queries, items) float32 products, -inf where a pair is of one identity or is not compared.
            query: the block's queries.
            items: the gallery's block.
        """
        highest_q = scores_qg.max(axis=1)
        self._raise_best_other(scores_qg, highest_q, query, items)
        rows_r = np.flatnonzero(highest_q >= self.under_q)
        if rows_r.size:
            self._count(scores_qg if len(rows_r) == len(scores_qg) else scores_qg[rows_r], rows_r, query, items)

    def _raise_best_other(self, scores_qg: Float32, highest_q: Float32, query: Rows, items: Rows) -> None:
        # Rows of -inf alone have nothing to offer.
        rows_r = np.flatnonzero((highest_q >= self.best_other_q - self.bound) & (highest_q > -np.inf))
        least_r = np.maximum(self.best_other_q[rows_r] - self.bound, highest_q[rows_r] - 2 * self.bound)
        place_K, item_K = np.divmod(np.flatnonzero(scores_qg[rows_r] >= least_r[:, None]), len(items))
        row_K = rows_r[place_K]
        np.maximum.at(self.best_other_q, row_K, exact_scores(query, items, row_K, item_K))

    def _count(self, scores_rg: Float32, rows_r: Int64, query: Rows, items: Rows) -> None:
        over_rg = scores_rg >= self.over_q[rows_r, None]
        over_q = np.zeros(len(query), np.int64)
        over_q[rows_r] = np.count_nonzero(over_rg, axis=1)
        self.ahead_L += over_q[self.row_L]
        between_rg = (scores_rg >= self.under_q[rows_r, None]) & ~over_rg
        place_K, item_K = np.divmod(np.flatnonzero(between_rg), len(items))
        self._place(rows_r[place_K], item_K, scores_rg[place_K, item_K], query, items)

    def _place(self, row_K: Int64, item_K: Int64, near_K: Float32, query: Rows, items: Rows) -> None:
        """Count K items that may stand before some of their row's mates; those close to a mate are scored again."""
        key_K: Float64 = np.add(row_K * APART, near_K, dtype=np.float64)
        next_K = np.searchsorted(self.key_L, key_K)
        edged_L = np.concatenate([[-np.inf], self.key_L, [np.inf]])
        distance_K = np.minimum(key_K - edged_L[next_K], edged_L[next_K + 1] - key_K)
        close_K = np.flatnonzero(distance_K <= self.bound)
        scores_K = exact_scores(query, items, row_K[close_K], item_K[close_K])
        key_K[close_K] = row_K[close_K] * APART + scores_K
        # An item with n mates of all rows at or below it stands before every mate of its own row among those n.
        below_K = np.searchsorted(self.key_L, key_K, side="right")
        after_L = _sum_after(np.bincount(below_K, minlength=len(self.key_L) + 1))[:-1]
        later_q = _sum_after(np.bincount(row_K, minlength=len(query)))
        self.ahead_L += after_L - later_q[self.row_L]


def _sum_after(count_N: Int64) -> Int64:
    """For each place, the sum of what stands after it."""
    total_N: Int64 = np.cumsum(count_N[::-1])[::-1] - count_N
    return total_N


def product_blocks(query: Side, gallery: Side, mates: Mates, columns: int) -> Iterator[tuple[slice, Float32]]:
    """Yield (gallery block, (queries, items) float32 products, -inf for mates and pairs that are not compared)."""
    unit_qD = query.rows.unit().astype(np.float32)
    for block in blocks(len(gallery.rows), columns):
        part = gallery.part(block)
        scores_qg = unit_qD @ part.rows.unit().astype(np.float32).T
        here = mates.within(block)
        scores_qg[mates.row_P[here], mates.item_P[here] - block.start] = -np.inf
        if query.group_N is not None and part.group_N is not None:
            scores_qg[query.group_N[:, None] == part.group_N[None, :]] = -np.inf
        yield block, scores_qg
