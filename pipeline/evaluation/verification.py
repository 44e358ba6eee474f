"""Scores of all pairs of images that a protocol compares (1:1).

Work goes in tiles, whose products are made in float32; genuine pairs, and impostors that may belong to the tail, are
scored again exactly (`exact`). So a score does not depend on the tile in which it happened to be computed. Memory is
bounded by `chunk_pairs`, the embeddings, the genuine pairs and the kept tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluation.exact import DENSE, Rows, error_bound
from pipeline.evaluation.impostors import EXCLUDED, Impostors
from pipeline.evaluation.metrics import Float32, Float64, Int64, VerificationScores, rounded

TILE_PAIRS = 1 << 18  # the passes over a tile's scores find them in the cache
FETCHED = 2048  # pairs scored one by one at a time
TAIL = 1_000_000  # impostor scores kept by default: 20 MB with their pairs


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
    chunk_pairs: int = TILE_PAIRS,
) -> VerificationScores:
    """Score every ordered pair (query, gallery item) that the protocol compares.

    A self-test (the same array on both sides) is symmetric: half of its pairs are scored, and count twice.

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
    assert (query_group_Q is None) == (gallery_group_G is None), "groups are given for both sides or for neither"
    half = same_images and query_QD is gallery_GD
    query, gallery = Rows.of(query_QD, "query"), Rows.of(gallery_GD, "gallery")
    if query_group_Q is not None and gallery_group_G is not None:
        # Group by group: most tiles then hold pairs of two groups, or of one, and need no mask.
        order_Q = np.argsort(query_group_Q, kind="stable")
        order_G = order_Q if same_images else np.argsort(gallery_group_G, kind="stable")
        query, query_identity_Q, query_group_Q = query[order_Q], query_identity_Q[order_Q], query_group_Q[order_Q]
        gallery, gallery_identity_G = gallery[order_G], gallery_identity_G[order_G]
        gallery_group_G = gallery_group_G[order_G]
    unit_QD = query.unit()
    unit_GD = unit_QD if half else gallery.unit()
    near_QD, near_GD = unit_QD.astype(np.float32), unit_GD.astype(np.float32)
    # Half as wide as what is given: the masks cost as much as the products.
    identity_Q, identity_G = _narrow(query_identity_Q, gallery_identity_G)
    group_Q, group_G = (None, None) if query_group_Q is None else _narrow(query_group_Q, gallery_group_G)
    impostors = Impostors(-(-tail // 2) if half else tail, error_bound(query_QD.shape[1]))
    mates: list[tuple[Int64, Int64]] = []
    for rows, columns in _tiles(len(query), len(gallery), chunk_pairs, half):
        same_group_qg = None if group_Q is None or group_G is None else _equal(group_Q[rows], group_G[columns])
        if same_group_qg is True:
            continue
        scores_qg = near_QD[rows] @ near_GD[columns].T
        if isinstance(same_group_qg, np.ndarray):
            np.copyto(scores_qg, np.float32(EXCLUDED), where=same_group_qg)
        if same_images:
            _exclude_diagonal(scores_qg, rows, columns, half)
        scores_P, width = scores_qg.ravel(), scores_qg.shape[1]
        mate_p = np.flatnonzero(identity_Q[rows, None] == identity_G[None, columns])
        row_p, column_p = np.divmod(mate_p[scores_P[mate_p] > EXCLUDED], width)
        mates.append((row_p + rows.start, column_p + columns.start))
        scores_P[mate_p] = EXCLUDED
        row_p, column_p = np.divmod(impostors.candidates(scores_P), width)
        exact_p = _exact(unit_QD[rows], unit_GD[columns], row_p, column_p)
        impostors.keep(exact_p, row_p + rows.start, column_p + columns.start)
    row_P = np.concatenate([rows_p for rows_p, _ in mates] or [np.empty(0, np.int64)])
    column_P = np.concatenate([columns_p for _, columns_p in mates] or [np.empty(0, np.int64)])
    _require_pairs(row_P.size, impostors.count, len(query), len(gallery))
    genuine_P = _exact(unit_QD, unit_GD, row_P, column_P)
    order_P = np.argsort(genuine_P, kind="stable")
    tail_T, row_T, column_T = impostors.highest()
    times = 2 if half else 1
    return VerificationScores(
        genuine_P=np.repeat(genuine_P[order_P], times),
        impostor_tail_T=np.repeat(tail_T, times)[:tail],
        impostor_histogram_B=impostors.histogram_B * times,
        impostors=impostors.count * times,
        genuine_identity_P=np.repeat(query_identity_Q[row_P[order_P]], times),
        tail_query_T=np.repeat(query_identity_Q[row_T], times)[:tail],
        tail_gallery_T=np.repeat(gallery_identity_G[column_T], times)[:tail],
        doubled=half,
    )


def _narrow(query_Q: Int64, gallery_G: Int64 | None) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Codes of both sides as 32-bit numbers, equal where they were equal."""
    assert gallery_G is not None
    code_N = np.unique(np.concatenate([query_Q, gallery_G]), return_inverse=True)[1].astype(np.int32)
    return code_N[: len(query_Q)], code_N[len(query_Q) :]


def _equal(left_q: npt.NDArray[np.int32], right_g: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_] | bool:
    """(q, g) where codes are equal; True or False if all or none are."""
    if left_q.max() < right_g.min() or left_q.min() > right_g.max():
        return False
    if left_q.min() == left_q.max() == right_g.min() == right_g.max():
        return True
    equal_qg: npt.NDArray[np.bool_] = left_q[:, None] == right_g[None, :]
    return equal_qg


def _exact(left_LD: Float64, right_RD: Float64, row_P: Int64, column_P: Int64) -> Float32:
    """(P,) scores of the listed pairs of unit rows: `exact.exact_scores`, of rows that are converted already."""
    if len(row_P) * DENSE >= len(left_LD) * len(right_RD):
        return rounded((left_LD @ right_RD.T)[row_P, column_P]).astype(np.float32)
    scores_P = np.empty(len(row_P), np.float32)
    for first in range(0, len(row_P), FETCHED):
        part = slice(first, first + FETCHED)
        left_pD, right_pD = left_LD[row_P[part]], right_RD[column_P[part]]
        scores_P[part] = rounded(np.einsum("pd,pd->p", left_pD, right_pD))
    return scores_P


def _tiles(queries: int, gallery: int, chunk_pairs: int, half: bool) -> Iterator[tuple[slice, slice]]:
    """Cut the pairs into tiles of at most `chunk_pairs`; of a symmetric matrix, those on and above the diagonal."""
    side = max(1, math.isqrt(chunk_pairs))
    for top in range(0, queries, side):
        for left in range(top if half else 0, gallery, side):
            yield slice(top, min(top + side, queries)), slice(left, min(left + side, gallery))


def _exclude_diagonal(scores_qg: Float32, rows: slice, columns: slice, half: bool) -> None:
    """Take out an image's pair with itself, and in a half also the pairs below the diagonal."""
    if rows.stop <= columns.start or columns.stop <= rows.start:
        return
    row_q, column_g = np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
    scores_qg[row_q >= column_g if half else row_q == column_g] = EXCLUDED


def _require_pairs(genuine: int, impostors: int, queries: int, gallery: int) -> None:
    for kind, count in (("genuine", genuine), ("impostor", impostors)):
        if not count:
            raise DataError(
                f"no {kind} pair among {queries} x {gallery} images once pairs within one group are "
                f"left out: the test set needs {'two groups an identity' if kind == 'genuine' else 'two identities'}"
            )
