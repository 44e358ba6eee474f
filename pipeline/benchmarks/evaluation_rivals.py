"""The public ways of evaluating: scikit-learn's ROC curve over all scores, and FAISS's flat index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from sklearn.metrics import roc_curve

from pipeline.evaluation.exact import Integers, blocks
from pipeline.evaluation.metrics import Float32, Int64
from pipeline.evaluation.pairs import Bools

BATCH = 100_000  # pairs that the public scripts gather and multiply at a time
ADDED = 1 << 16  # items given to the index at once


def _unit(vectors_ND: Float32) -> Float32:
    unit_ND: Float32 = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


def roc_way(vectors_TD: Float32, pairs_P2: Integers, same_P: Bools, fars: Sequence[float]) -> dict[float, float]:
    """Score the pairs in batches, sort all scores into a ROC curve, and read TAR off it.

    Returns:
        FAR -> the TPR of the curve's last point whose FPR is not above it.
    """
    unit_TD = _unit(vectors_TD)
    scores_P = np.empty(len(pairs_P2), np.float32)
    for block in blocks(len(pairs_P2), BATCH):
        left_bD, right_bD = unit_TD[pairs_P2[block, 0]], unit_TD[pairs_P2[block, 1]]
        scores_P[block] = np.sum(left_bD * right_bD, axis=1)
    far_K, tar_K, _ = roc_curve(same_P, scores_P, drop_intermediate=False)
    return {far: float(tar_K[np.searchsorted(far_K, far, side="right") - 1]) for far in fars}


@dataclass(frozen=True)
class Found:
    """What a flat index found: (Q, k) items, best first, and the seconds of the search alone."""

    item_QK: Int64
    seconds: float


def faiss_flat(query_QD: Float32, gallery_GD: Float32, k: int) -> Found:
    """Build a flat inner-product index of the gallery, and search it."""
    index = faiss.IndexFlatIP(gallery_GD.shape[1])
    for block in blocks(len(gallery_GD), ADDED):
        index.add(_unit(gallery_GD[block]))
    unit_QD = _unit(query_QD)
    began = time.perf_counter()
    item_QK = index.search(unit_QD, k)[1]
    return Found(item_QK, time.perf_counter() - began)


def set_threads(threads: int) -> None:
    """Let FAISS use as many threads as our products do."""
    faiss.omp_set_num_threads(threads)
