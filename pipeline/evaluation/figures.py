"""The figures of one pair of generations, each with its replicates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.bootstrap import Estimate, Numbers, Resampling, WeightedTail
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.identification import (
    SearchOutcomes,
    mean_average_precision,
    rank_k,
    search,
    tpir_at_fpir,
)
from pipeline.evaluation.metrics import Float32, Float64, Int64, VerificationScores
from pipeline.evaluation.settings import MAP, EvaluationConfig, rate_name, tar_name, tpir_name

Bools = npt.NDArray[np.bool_]

DET_POINTS = 24  # of the band; the curve itself has more
DET_REPLICATES = 200
REACH = 1.3  # a FAR is resampled with its threshold while the tail is that much longer than it needs


@dataclass(frozen=True)
class Det:
    """A DET curve and, at fewer FARs, the 95 % interval of the false reject rate.

    Attributes:
        far_K: (K,) share of impostors, ascending.
        frr_K: (K,) share of genuine pairs.
        band_far_J: (J,) FARs of the band.
        low_J: (J,) the band's lower end.
        high_J: (J,) its upper end.
    """

    far_K: Float64
    frr_K: Float64
    band_far_J: Float64
    low_J: Float64
    high_J: Float64


@dataclass(frozen=True)
class Threshold:
    """Where a pair accepts: the threshold at a FAR, and the same of each replicate, (R,)."""

    value: float
    replicates_R: Float32


@dataclass(frozen=True)
class Images:
    """What all generations share: the test images' labels, and the draws.

    Attributes:
        code_N: (N,) int64 the images' identities, numbered from 0 without gaps.
        enrolled_N: (N,) bool.
        first_half_N: (N,) bool, the identity belongs to the first gallery of the open set.
        resampling: of the identities.
        impostors_R: (R,) weighted number of impostor pairs.
    """

    code_N: Int64
    enrolled_N: Bools
    first_half_N: Bools
    resampling: Resampling
    impostors_R: Int64

    @classmethod
    def of(cls, embeddings: Embeddings, config: EvaluationConfig) -> Images:
        """Number the identities and draw from them."""
        row_I, code_N = np.unique(embeddings.identity_N, return_inverse=True)
        resampling = Resampling.draw(len(row_I), config.bootstrap, config.seed)
        impostors_R = resampling.impostor_weight(code_N, embeddings.group_N) if config.far else np.empty(0, np.int64)
        half_N = first_half(row_I, embeddings.identity_N[embeddings.is_gallery_N], config.seed)[code_N]
        return cls(code_N, embeddings.is_gallery_N, half_N, resampling, impostors_R)


def first_half(row_I: Int64, enrolled_rows: Int64, seed: int) -> Bools:
    """(I,) which identities belong to the first of the open set's two galleries.

    Enrolled identities are put in the order of a hash of (seed, row), and the first half taken: the galleries differ by
    at most one identity, and do not depend on the order of the images.
    """
    shuffled = in_hash_order(enrolled_rows, seed)
    return np.isin(row_I, shuffled[: (len(shuffled) + 1) // 2])


def in_hash_order(values: Int64, seed: int) -> list[int]:
    """Each value once, in the order of a hash of (seed, value): whatever order they come in."""
    distinct: list[int] = np.unique(values).tolist()
    return sorted(distinct, key=lambda value: hashlib.sha256(f"{seed}/{value}".encode()).digest())


def search_enrolled(
    vectors_ND: Float32,
    gallery: Embeddings,
    images: Images,
    among_N: Bools | None = None,
    average_precision: bool = False,
) -> SearchOutcomes:
    """Search enrolled images with all queries.

    Args:
        vectors_ND: (N, D) the test images by the query's model, in the gallery's dimension.
        gallery: the test images by the gallery's model.
        images: their labels.
        among_N: which of the images are in the gallery; None: all enrolled ones.
        average_precision: as in `identification.search`.
    """
    query_N, item_N = ~images.enrolled_N, images.enrolled_N if among_N is None else among_N
    return search(
        vectors_ND[query_N],
        images.code_N[query_N],
        gallery.vectors_ND[item_N],
        images.code_N[item_N],
        query_group_Q=gallery.group_N[query_N],
        gallery_group_G=gallery.group_N[item_N],
        average_precision=average_precision,
    )


def closed_set(outcomes: SearchOutcomes, images: Images, config: EvaluationConfig) -> dict[str, Estimate]:
    """rank-k and mAP over the mated queries."""
    figures: dict[str, Estimate] = {}
    mated_Q = outcomes.mated_Q.astype(np.int64)

    def resampled(value: float, of_query_Q: Numbers) -> Estimate:
        share = images.resampling.share_of_items(of_query_Q, outcomes.identity_Q, mated_Q)
        return replace(share, value=value)

    for k, value in (rank_k(outcomes, config.ranks) if config.ranks else {}).items():
        figures[f"rank{k}"] = resampled(value, outcomes.ahead_Q < k)
    if config.mean_average_precision:
        precision_Q = np.nan_to_num(outcomes.average_precision_Q)
        figures[MAP] = resampled(mean_average_precision(outcomes), precision_Q)
    return figures


def open_set(vectors_ND: Float32, gallery: Embeddings, images: Images, fpirs: Sequence[float]) -> dict[str, Estimate]:
    """TPIR at each FPIR: the mean over two galleries, each of half of the enrolled identities.

    Every query searches both; one whose identity is not in a gallery is a non-mated one there. This is the protocol of
    IJB-C, whose galleries G1 and G2 share no identity (Maze et al., ICB 2018); Shen et al. 2020 report the mean.

    Raises:
        DataError: a gallery is empty, or too few queries are non-mated for a FPIR.
    """
    halves = []
    for half_N in (images.first_half_N, ~images.first_half_N):
        among_N = images.enrolled_N & half_N
        if not among_N.any():
            raise DataError("open-set search needs two enrolled identities or more: enrol more, or ask for no fpir")
        halves.append(search_enrolled(vectors_ND, gallery, images, among_N))
    return {tpir_name(fpir): open_set_of(halves, images.resampling, fpir) for fpir in fpirs}


def open_set_of(halves: Sequence[SearchOutcomes], resampling: Resampling, fpir: float) -> Estimate:
    """Mean TPIR of several galleries' outcomes."""
    value = float(np.mean([tpir_at_fpir(one, fpir) for one in halves]))
    return Estimate(value, np.mean([_tpir_replicates(one, resampling, fpir) for one in halves], axis=0))


def _tpir_replicates(outcomes: SearchOutcomes, resampling: Resampling, fpir: float) -> Float64:
    """(R,) TPIR by the rule of `identification.tpir_at_fpir`, each query counting as often as its identity."""
    unmated_Q, first_Q = ~outcomes.mated_Q, outcomes.mated_Q & (outcomes.ahead_Q == 0)
    threshold_R = resampling.query_threshold(outcomes.best_other_Q[unmated_Q], outcomes.identity_Q[unmated_Q], fpir)
    mates_I = np.bincount(outcomes.identity_Q[outcomes.mated_Q], minlength=len(resampling.weight_IR))
    return resampling.share_reaching(outcomes.best_mate_Q[first_Q], outcomes.identity_Q[first_Q], mates_I, threshold_R)


@dataclass(frozen=True)
class Verified:
    """What the pairs of images tell.

    Attributes:
        metrics: TAR by name.
        thresholds: by "far@...".
        far_at_old: false accept rates at other thresholds, by "far@...".
    """

    metrics: dict[str, Estimate]
    thresholds: dict[str, Threshold]
    far_at_old: dict[str, Estimate]


def verify(
    scores: VerificationScores, images: Images, config: EvaluationConfig, old: Mapping[str, Threshold] | None
) -> Verified:
    """TAR at each FAR; and the FAR at the thresholds `old` of another pair, if they are given.

    In a replicate, the old threshold is that of the same draw. Where it lies below the kept tail, the FAR of all
    identities at that threshold stands for the replicate's.

    Raises:
        DataError: too few pairs for a FAR.
    """
    tail = WeightedTail(scores, images.resampling, images.impostors_R) if images.resampling.replicates else None
    verified = Verified({}, {}, {})
    for far in config.far:
        name, none_R = rate_name("far", far), np.empty(0)
        threshold = Threshold(metrics.threshold_at_far(scores, far), none_R.astype(np.float32))
        tar_R = none_R
        if tail is not None:
            threshold = replace(threshold, replicates_R=tail.threshold(far))
            tar_R = tar_replicates(scores, images.resampling, threshold.replicates_R)
        verified.thresholds[name] = threshold
        verified.metrics[tar_name(far)] = Estimate(metrics.tar_at_far(scores, far), tar_R)
        if old is not None and name in old:
            far_R = none_R if tail is None else _far_replicates(scores, tail, old[name].replicates_R)
            verified.far_at_old[name] = Estimate(metrics.far_at_threshold(scores, old[name].value), far_R)
    return verified


def tar_replicates(scores: VerificationScores, resampling: Resampling, threshold_R: Float32) -> Float64:
    """(R,) weighted share of the genuine pairs that reach each replicate's threshold."""
    assert scores.genuine_identity_P is not None
    pairs_I = np.bincount(scores.genuine_identity_P, minlength=len(resampling.weight_IR))
    return resampling.share_reaching(scores.genuine_P, scores.genuine_identity_P, pairs_I, threshold_R)


def _far_replicates(scores: VerificationScores, tail: WeightedTail, threshold_R: Float32) -> Float64:
    far_R = tail.far(threshold_R)
    for replicate in np.flatnonzero(np.isnan(far_R)):
        far_R[replicate] = metrics.far_at_threshold(scores, float(threshold_R[replicate]))
    return far_R


def det(scores: VerificationScores, images: Images) -> Det:
    """The DET curve and its band.

    Within the kept tail a replicate's threshold is its own. At higher FARs the threshold is held at that of all
    identities: so many impostors lie above it that the draws hardly move it, and the genuine pairs make the band.
    """
    far_K, frr_K, threshold_K = metrics.det_points(scores)
    resampling = images.resampling.first(DET_REPLICATES)
    if not resampling.replicates:
        return Det(far_K, frr_K, *np.empty((3, 0)))
    tail = WeightedTail(scores, resampling, images.impostors_R[:DET_REPLICATES])
    inner_K = np.flatnonzero((far_K > 0) & (far_K < 1))
    chosen_J = inner_K
    if len(inner_K) > DET_POINTS:
        chosen_J = inner_K[np.linspace(0, len(inner_K) - 1, DET_POINTS).astype(np.int64)]
    ends = np.empty((len(chosen_J), 2))
    for place, point in enumerate(chosen_J):
        far, held_R = float(far_K[point]), np.full(resampling.replicates, threshold_K[point])
        reached = far * REACH * scores.impostors < len(scores.impostor_tail_T)
        tar_R = tar_replicates(scores, resampling, tail.threshold(far) if reached else held_R)
        ends[place] = Estimate(1 - float(frr_K[point]), 1 - tar_R).interval() or (np.nan, np.nan)
    return Det(far_K, frr_K, far_K[chosen_J], ends[:, 0], ends[:, 1])
