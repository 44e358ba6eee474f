"""Partial backfill: the gallery is embedded again bit by bit, while the new model's queries already search it.

At share s the first s of the gallery, in some order, are the new model's, the others still the old one's. A score is a
cosine in the item's own dimension: of the whole query with an item of the new model, of the query's leading values with
an item of a smaller old one. Where the new model has learned a map, the query, or each old item, is mapped instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.compatibility import Embeddings, comparable_gallery, comparable_query
from pipeline.evaluation.figures import Images
from pipeline.evaluation.identification import SearchOutcomes, search, tpir_at_fpir
from pipeline.evaluation.metrics import Float32, Int64, score_blocks, unit_rows
from pipeline.evaluation.settings import EvaluationConfig, tpir_name

STEPS = 10
SHARES = tuple(step / STEPS for step in range(STEPS + 1))


def backfill(new: Embeddings, old: Embeddings, images: Images, config: EvaluationConfig) -> dict[str, Any]:
    """The figures at each share of the gallery embedded again, in a random order and the most ambiguous items first.

    Args:
        new: the test images by the model that queries, and that embeds the gallery again.
        old: the same images by the model of the gallery as it is.
        images: their labels.
        config: rank1 is reported if it asks for ranks, and TPIR at its FPIRs.

    Returns:
        `share`: STEPS + 1 shares; `random` and `uncertainty`: by metric its values, and by `area` the area under each
        by the trapezoid rule: the mean figure while the backfill runs at a constant rate. Empty if no metric is asked
        for that has a curve.
    """
    names = ["rank1"] * bool(config.ranks) + [tpir_name(fpir) for fpir in config.fpir]
    if not names:
        return {}
    items = np.flatnonzero(images.enrolled_N)
    orders = {
        "random": np.random.default_rng([config.seed, len(items)]).permutation(len(items)),
        "uncertainty": np.argsort(-ambiguity(old, images), kind="stable"),
    }
    # Where an item is embedded again, and in which of the open set's galleries it stands.
    half_G = np.where(images.first_half_N[items], 0, 1)
    buckets = [2 * _chunks(order_G) + half_G for order_G in orders.values()]
    found = [_best_by_bucket(new, gallery, images, buckets) for gallery in (new, old)]
    curves: dict[str, Any] = {"share": list(SHARES)}
    for place, name in enumerate(orders):
        by_new, by_old = (best[place] for best in found)
        values = [_figures_at(step, by_new, by_old, images, config) for step in range(STEPS + 1)]
        curve: dict[str, Any] = {metric: [one[metric] for one in values] for metric in names}
        curves[name] = curve | {"area": {metric: area(curve[metric]) for metric in names}}
    return curves


def area(values: Sequence[float]) -> float:
    """Area under evenly spaced values over [0, 1], by the trapezoid rule."""
    return float(np.trapezoid(values, dx=1 / (len(values) - 1)))


def ambiguity(old: Embeddings, images: Images) -> Float32:
    """(G,) how easily each enrolled image is taken for another identity, from the old gallery alone.

    It is the cosine to the nearest enrolled image of another identity: the larger, the smaller the margin that is left
    to a query.
    """
    rows = images.enrolled_N
    vectors_GD, identity_G = old.vectors_ND[rows], images.code_N[rows]
    return search(vectors_GD, identity_G, vectors_GD, identity_G, average_precision=False).best_other_Q


def _chunks(order_G: Int64) -> Int64:
    """(G,) in which of the STEPS each item is embedded again."""
    chunk_G = np.empty(len(order_G), np.int64)
    edges = np.rint(np.array(SHARES) * len(order_G)).astype(np.int64)
    chunk_G[order_G] = np.repeat(np.arange(STEPS), np.diff(edges))
    return chunk_G


@dataclass(frozen=True)
class _Best:
    """The highest scores of each query within each bucket of the gallery, (Q, 2 * STEPS); -inf where there is none."""

    mate_QK: Float32
    other_QK: Float32


def _best_by_bucket(query: Embeddings, gallery: Embeddings, images: Images, buckets: Sequence[Int64]) -> list[_Best]:
    """Search the gallery once, for all ways of cutting it."""
    query_N, item_N = ~images.enrolled_N, images.enrolled_N
    unit_QD = unit_rows(comparable_query(query, gallery)[query_N], "query")
    unit_GD = unit_rows(comparable_gallery(query, gallery).vectors_ND[item_N], "gallery")
    shape = len(unit_QD), 2 * STEPS
    best = [_Best(*np.full((2, *shape), -np.inf, np.float32)) for _ in buckets]
    cuts = []
    for bucket_G in buckets:
        order_G = np.argsort(bucket_G, kind="stable")
        there, start = np.unique(bucket_G[order_G], return_index=True)
        cuts.append((order_G, there, start))
    identity_Q, identity_G = images.code_N[query_N], images.code_N[item_N]
    group_Q, group_G = query.group_N[query_N], query.group_N[item_N]
    for block, scores_qG in score_blocks(unit_QD, unit_GD):
        scores_qG[group_Q[block, None] == group_G[None, :]] = -np.inf
        mate_qG = identity_Q[block, None] == identity_G[None, :]
        mates_qG = np.where(mate_qG, scores_qG, np.float32(-np.inf))
        scores_qG[mate_qG] = -np.inf
        for one, (order_G, there, start) in zip(best, cuts, strict=True):
            one.mate_QK[block, there] = np.maximum.reduceat(mates_qG[:, order_G], start, axis=1)
            one.other_QK[block, there] = np.maximum.reduceat(scores_qG[:, order_G], start, axis=1)
    return best


def _figures_at(step: int, by_new: _Best, by_old: _Best, images: Images, config: EvaluationConfig) -> dict[str, float]:
    """All figures once the first `step` chunks are embedded again."""
    both = np.arange(2 * STEPS)
    figures: dict[str, float] = {}
    if config.ranks:
        whole = _outcomes(both, step, by_new, by_old, images)
        figures["rank1"] = float(np.mean(whole.ahead_Q[whole.mated_Q] == 0))
    halves = [_outcomes(both[both % 2 == half], step, by_new, by_old, images) for half in (0, 1)] if config.fpir else []
    for fpir in config.fpir:
        figures[tpir_name(fpir)] = float(np.mean([tpir_at_fpir(half, fpir) for half in halves]))
    return figures


def _outcomes(columns: Int64, step: int, by_new: _Best, by_old: _Best, images: Images) -> SearchOutcomes:
    """What each query finds in some buckets of the mixed gallery; only whether something is ahead, not how much."""
    renewed, left = columns[columns < 2 * step], columns[columns >= 2 * step]
    mate_Q, other_Q = (
        np.hstack([getattr(by_new, side)[:, renewed], getattr(by_old, side)[:, left]]).max(axis=1)
        for side in ("mate_QK", "other_QK")
    )
    identity_Q = images.code_N[~images.enrolled_N]
    ahead_Q = (other_Q >= mate_Q).astype(np.int64)
    return SearchOutcomes(identity_Q, mate_Q > -np.inf, mate_Q, other_Q, ahead_Q, np.full(len(mate_Q), np.nan))
