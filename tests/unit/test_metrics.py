"""TAR@FAR and DET against quadratic Python references, and cases worked out by hand."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import (
    VerificationScores,
    det_curve,
    det_points,
    far_at_threshold,
    tar_at_far,
    threshold_at_far,
    unit_rows,
)
from pipeline.evaluation.verification import verification

Array = npt.NDArray[Any]


def cosine(a_D: Array, b_D: Array) -> float:
    """The score of one pair, summed one product at a time in Python floats, then rounded as documented."""
    a, b = [float(x) for x in a_D], [float(x) for x in b_D]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    score = dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(x * x for x in b))
    return round(score * 2**24) / 2**24


def reference_pairs(
    query: Array, query_id: Array, query_group: Array, gallery: Array, gallery_id: Array, gallery_group: Array
) -> tuple[list[float], list[float]]:
    genuine: list[float] = []
    impostor: list[float] = []
    for i in range(len(query)):
        for j in range(len(gallery)):
            if query_group[i] != gallery_group[j]:
                (genuine if query_id[i] == gallery_id[j] else impostor).append(cosine(query[i], gallery[j]))
    return genuine, impostor


def reference_tar(genuine: list[float], impostor: list[float], far: tuple[int, int]) -> float:
    """Try every score that occurs, and one above all, as threshold; FAR is a fraction (numerator, denominator)."""
    best = 0.0
    for threshold in {*genuine, *impostor, 2.0}:
        accepted = sum(score >= threshold for score in impostor)
        if accepted * far[1] <= far[0] * len(impostor):
            best = max(best, sum(score >= threshold for score in genuine) / len(genuine))
    return best


def scores_of(genuine: list[float], impostor: list[float], tail: int | None = None) -> VerificationScores:
    impostor_P = np.array(impostor, np.float32)
    histogram_B = np.histogram(impostor_P, metrics.BINS, (-1, 1))[0].astype(np.int64)
    return VerificationScores(
        np.sort(np.array(genuine, np.float32)), np.sort(impostor_P)[::-1][:tail], histogram_B, impostor_P.size
    )


def random_set(seed: int, count: int, identities: int, groups: int, dim: int = 7) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    identity = random.integers(identities, size=count)
    centre = random.standard_normal((identities, dim))
    vectors = centre[identity] + 0.8 * random.standard_normal((count, dim))
    return vectors.astype(np.float32), identity, random.integers(groups, size=count)


# Pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_pairs", [1, 100, 2_000_000])
def test_verification_matches_reference(chunk_pairs: int) -> None:
    query, query_id, query_group = random_set(1, 31, 8, 3)
    gallery, gallery_id, gallery_group = random_set(2, 23, 8, 3)
    genuine, impostor = reference_pairs(query, query_id, query_group, gallery, gallery_id, gallery_group)
    scores = verification(
        query,
        query_id,
        gallery,
        gallery_id,
        query_group_Q=query_group,
        gallery_group_G=gallery_group,
        chunk_pairs=chunk_pairs,
    )
    assert scores.impostors == len(impostor)
    np.testing.assert_allclose(scores.genuine_P, sorted(genuine), atol=1e-7)
    np.testing.assert_allclose(scores.impostor_tail_T, sorted(impostor, reverse=True), atol=1e-7)


@pytest.mark.parametrize(("tail", "chunk_pairs"), [(1, 23), (5, 23), (37, 50), (37, 1000), (10_000, 50)])
def test_tail_holds_the_highest_impostors_and_the_histogram_all(tail: int, chunk_pairs: int) -> None:
    vectors, identity, group = random_set(4, 61, 8, 4)
    keywords: dict[str, Any] = {"query_group_Q": group, "gallery_group_G": group, "chunk_pairs": chunk_pairs}
    every = verification(vectors, identity, vectors, identity, **keywords)
    kept = verification(vectors, identity, vectors, identity, tail=tail, **keywords)
    np.testing.assert_array_equal(kept.impostor_tail_T, every.impostor_tail_T[:tail])
    np.testing.assert_array_equal(kept.impostor_histogram_B, every.impostor_histogram_B)
    assert kept.impostors == every.impostors == kept.impostor_histogram_B.sum() > tail or tail == 10_000
    for edge in (0, 700, 1024, 2047):
        at_least = sum(float(score) >= -1 + edge / 1024 for score in every.impostor_tail_T)
        assert kept.impostor_histogram_B[edge:].sum() == at_least


def test_single_item_groups_leave_out_only_the_image_itself() -> None:
    vectors, identity, _ = random_set(5, 19, 4, 1)
    own = np.arange(19)
    by_group = verification(vectors, identity, vectors, identity, query_group_Q=own, gallery_group_G=own)
    by_flag = verification(vectors, identity, vectors, identity, same_images=True, chunk_pairs=40)
    np.testing.assert_array_equal(by_group.genuine_P, by_flag.genuine_P)
    np.testing.assert_array_equal(by_group.impostor_tail_T, by_flag.impostor_tail_T)
    assert by_flag.genuine_P.size + by_flag.impostors == 19 * 18
    assert by_flag.genuine_P.max() < 1


def test_scores_do_not_depend_on_the_chunk() -> None:
    vectors, identity, _ = random_set(6, 300, 40, 1, dim=129)
    whole = verification(vectors, identity, vectors, identity, same_images=True)
    for chunk_pairs in (300, 7 * 300, 64 * 300):
        parts = verification(vectors, identity, vectors, identity, same_images=True, chunk_pairs=chunk_pairs)
        np.testing.assert_array_equal(parts.genuine_P, whole.genuine_P)
        np.testing.assert_array_equal(parts.impostor_tail_T, whole.impostor_tail_T)


@pytest.mark.parametrize("chunk_pairs", [23, 400, 10_000])
def test_half_of_a_self_test_is_the_whole(chunk_pairs: int) -> None:
    vectors, identity, group = random_set(7, 61, 9, 4)
    keywords: dict[str, Any] = {"query_group_Q": group, "gallery_group_G": group, "same_images": True}
    half = verification(vectors, identity, vectors, identity, tail=501, chunk_pairs=chunk_pairs, **keywords)
    whole = verification(vectors, identity, vectors.copy(), identity, tail=501, **keywords)
    assert (half.doubled, whole.doubled) == (True, False)
    assert half.impostors == whole.impostors
    for name in ("genuine_P", "impostor_tail_T", "impostor_histogram_B"):
        np.testing.assert_array_equal(getattr(half, name), getattr(whole, name), name)
    assert len(half.impostor_tail_T) == 501


def test_scores_keep_the_identities_of_their_pairs() -> None:
    query, query_id, _ = random_set(15, 29, 6, 1)
    gallery, gallery_id, _ = random_set(16, 37, 6, 1)
    scores = verification(query, query_id, gallery, gallery_id, tail=40, chunk_pairs=100)
    pairs = [(cosine(q, g), i, j) for q, i in zip(query, query_id, strict=True)
             for g, j in zip(gallery, gallery_id, strict=True)]  # fmt: skip
    highest = sorted((pair for pair in pairs if pair[1] != pair[2]), reverse=True)[:40]
    assert scores.tail_query_T is not None
    assert scores.tail_gallery_T is not None
    assert scores.genuine_identity_P is not None
    found = zip(scores.impostor_tail_T.tolist(), scores.tail_query_T, scores.tail_gallery_T, strict=True)
    assert list(found) == highest
    genuine = sorted((score, i) for score, i, j in pairs if i == j)
    assert list(zip(scores.genuine_P.tolist(), scores.genuine_identity_P, strict=True)) == genuine


def test_a_collapsed_model_keeps_its_tail_bounded() -> None:
    vectors = np.ones((40, 3), np.float32)
    scores = verification(vectors, np.arange(40) // 2, vectors, np.arange(40) // 2, same_images=True, tail=11)
    np.testing.assert_array_equal(scores.impostor_tail_T, np.ones(11, np.float32))
    assert scores.impostor_histogram_B[-1] == scores.impostors == 40 * 38


def test_cancelling_embeddings_lie_in_the_bin_of_nought() -> None:
    random = np.random.default_rng(0)
    left = random.standard_normal((50, 64)).astype(np.float32)
    query, gallery = np.hstack([left, left]), np.hstack([left, -left])
    scores = verification(query, np.arange(50), gallery, np.arange(50), query_group_Q=np.arange(50) * 0,
                          gallery_group_G=1 + np.arange(50) * 0)  # fmt: skip
    every = [cosine(q, g) for i, q in enumerate(query) for j, g in enumerate(gallery) if i != j]
    assert scores.impostor_histogram_B[1024:].sum() >= sum(score >= 0 for score in every)
    np.testing.assert_array_equal(scores.genuine_P, np.zeros(50, np.float32))


def test_opposite_and_equal_embeddings_lie_in_the_histogram() -> None:
    vectors = np.array([[0.3, 0.1], [-0.3, -0.1], [0.3, 0.1], [0.3, 0.1]], np.float32)
    scores = verification(vectors, np.array([0, 1, 2, 0]), vectors, np.array([0, 1, 2, 0]), same_images=True)
    assert scores.impostors == scores.impostor_histogram_B.sum() == 10
    assert scores.impostor_histogram_B[0] == 6
    assert scores.impostor_histogram_B[-1] == 4


# TAR@FAR --------------------------------------------------------------------------------------------------------


def test_tar_at_far_by_hand() -> None:
    impostor = [0.01 * i for i in range(100)]  # 0.00 .. 0.99
    scores = scores_of([0.895, 0.905, 0.985, 0.99, 0.995, 0.5, 0.2, 0.3, 0.4, 0.985], impostor)
    # 10 % may pass: 0.90 .. 0.99; the threshold lies just above 0.89, so 0.895 passes.
    assert tar_at_far(scores, 0.1) == pytest.approx(0.6)
    assert float(np.float32(0.89)) < threshold_at_far(scores, 0.1) < 0.8900001
    # 1 %: only 0.99 may pass; 0.985 is above 0.98.
    assert tar_at_far(scores, 0.01) == pytest.approx(0.4)
    assert tar_at_far(scores, 0.019) == pytest.approx(0.4)
    assert tar_at_far(scores, 1.0) == 1.0


def test_far_is_the_decimal_that_was_written() -> None:
    assert math.floor(0.29 * 100) == 28  # what binary floating point would make of it
    impostor = [0.01 * i for i in range(100)]
    assert tar_at_far(scores_of([0.705], impostor), 0.29) == 1.0
    assert tar_at_far(scores_of([0.705], impostor), 0.28) == 0.0


def test_tied_impostors_are_rejected_together_with_a_genuine_pair_among_them() -> None:
    scores = scores_of([0.5, 0.6, 0.9], [0.9, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert tar_at_far(scores, 0.2) == pytest.approx(1 / 3)  # two may pass, but three share the second place
    assert tar_at_far(scores, 0.4) == pytest.approx(1.0)
    assert tar_at_far(scores, 0.1) == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=20),
    st.lists(st.integers(-8, 8), min_size=1, max_size=40),
    st.integers(1, 100),
)
def test_tar_at_far_matches_reference(genuine_eighths: list[int], impostor_eighths: list[int], percent: int) -> None:
    genuine, impostor = [x / 8 for x in genuine_eighths], [x / 8 for x in impostor_eighths]
    scores = scores_of(genuine, impostor)
    if percent * len(impostor) < 100:
        with pytest.raises(DataError, match="impostor pairs"):
            tar_at_far(scores, percent / 100)
        return
    assert tar_at_far(scores, percent / 100) == pytest.approx(reference_tar(genuine, impostor, (percent, 100)))
    threshold = threshold_at_far(scores, percent / 100)
    assert sum(score >= threshold for score in impostor) * 100 <= percent * len(impostor)
    if math.isfinite(threshold):  # and one float32 lower would be too low: the smallest such threshold
        lower = np.nextafter(np.float32(threshold), np.float32(-2))
        assert sum(score >= lower for score in impostor) * 100 > percent * len(impostor)


def test_small_tail_is_exact_up_to_its_far_and_refuses_beyond() -> None:
    vectors, identity, group = random_set(8, 83, 11, 3)
    keywords: dict[str, Any] = {"query_group_Q": group, "gallery_group_G": group}
    every = verification(vectors, identity, vectors, identity, **keywords)
    kept = verification(vectors, identity, vectors, identity, tail=every.impostors // 10 + 1, **keywords)
    for far in (1e-3, 0.01, 0.0973, 0.1):
        assert 0 < tar_at_far(kept, far) == tar_at_far(every, far)
    with pytest.raises(DataError, match=r"FAR 0.2 over .* call verification with tail=\d+ or more"):
        tar_at_far(kept, 0.2)


def test_the_tail_must_hold_the_first_rejected_impostor() -> None:
    impostor = [0.01 * i for i in range(100)]
    assert tar_at_far(scores_of([0.935, 0.945], impostor, tail=6), 0.05) == 0.5
    with pytest.raises(DataError, match=r"needs their 6 highest scores, but 5 were kept: .*tail=6 or more"):
        tar_at_far(scores_of([0.935, 0.945], impostor, tail=5), 0.05)


@pytest.mark.parametrize(("far", "needed"), [(1e-3, 1000), (3e-4, 3334), (0.003, 334)])
def test_too_few_impostors_says_how_many_are_needed(far: float, needed: int) -> None:
    enough = scores_of([0.5], [0.1] * needed)
    assert tar_at_far(enough, far) == 1.0
    with pytest.raises(DataError, match=f"needs at least {needed} impostor pairs, but the test set gives {needed - 1}"):
        tar_at_far(scores_of([0.5], [0.1] * (needed - 1)), far)


def test_far_at_a_threshold_by_hand() -> None:
    impostor = [0.01 * i for i in range(100)]
    whole, cut = scores_of([0.5], impostor), scores_of([0.5], impostor, tail=10)
    for scores in (whole, cut):
        assert far_at_threshold(scores, 0.955) == 0.04
        assert far_at_threshold(scores, float(np.float32(0.95))) == 0.05  # at the threshold itself one passes
        assert far_at_threshold(scores, 1.5) == 0.0
        assert far_at_threshold(scores, threshold_at_far(scores, 0.07)) == 0.07
    assert far_at_threshold(whole, 0.255) == 0.74
    # Below the tail the histogram tells: no score lies between these edges, so it is exact there too.
    assert far_at_threshold(cut, 0.255) == pytest.approx(0.74, abs=1e-9)
    assert far_at_threshold(cut, -1.0) == 1.0


# DET ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [None, 1, 40])
def test_det_points_are_exact_and_ordered(tail: int | None) -> None:
    random = np.random.default_rng(9)
    genuine = random.uniform(-0.2, 1, 57).astype(np.float32).tolist()
    impostor = random.uniform(-1, 0.6, 999).astype(np.float32).tolist()
    far_K, frr_K = det_curve(scores_of(genuine, impostor, tail), points=60)
    assert 20 < len(far_K) <= 60
    assert (np.diff(far_K) >= 0).all()
    assert (np.diff(frr_K) <= 0).all()
    assert far_K[0] == (0 if tail == 1 else pytest.approx(1 / 999))
    assert (far_K[-1], frr_K[-1]) == (1.0, 0.0)
    # Every point occurs on the curve drawn from all thresholds: those of the scores, and the histogram's edges.
    ticks = {*genuine, *impostor, *(float(x) for x in metrics.EDGES_B), 2.0}
    exact = {
        (sum(s >= t for s in impostor), sum(s < t for s in genuine)) for t in sorted(ticks)
    }  # counts, so that no rounding intervenes
    for far, frr in zip(far_K, frr_K, strict=True):
        assert (round(far * 999), round(frr * 57)) in exact


def test_det_agrees_with_tar_at_far() -> None:
    vectors, identity, group = random_set(10, 120, 15, 4)
    scores = verification(vectors, identity, vectors, identity, query_group_Q=group, gallery_group_G=group)
    far_K, frr_K = det_curve(scores, points=50)
    # A self-test holds (i, j) and (j, i), so its top score comes twice and no impostor passes at first.
    assert (far_K[0], far_K[-1]) == (0.0, 1.0)
    for far, frr in zip(far_K[1:-1], frr_K[1:-1], strict=True):
        assert 1 - tar_at_far(scores, far + 1e-9) == pytest.approx(frr)


def test_det_points_give_their_thresholds() -> None:
    vectors, identity, group = random_set(17, 90, 12, 3)
    scores = verification(vectors, identity, vectors, identity, query_group_Q=group, gallery_group_G=group, tail=300)
    far_K, frr_K, threshold_K = det_points(scores, points=30)
    for far, frr, threshold in zip(far_K[far_K < 0.05], frr_K[far_K < 0.05], threshold_K, strict=False):
        assert far_at_threshold(scores, float(threshold)) == far
        assert np.mean(scores.genuine_P < threshold) == frr


def test_det_of_a_collapsed_model() -> None:
    far_K, frr_K = det_curve(scores_of([1.0] * 3, [1.0] * 50, tail=10), points=5)
    assert set(zip(far_K.tolist(), frr_K.tolist(), strict=True)) == {(0.0, 1.0), (1.0, 0.0)}


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    vectors, identity, _ = random_set(12, 9, 2, 1)
    broken = vectors.copy()
    broken[6, 3] = bad
    with pytest.raises(DataError, match="query embedding row 6 holds NaN or infinity"):
        verification(broken, identity, vectors, identity)
    with pytest.raises(DataError, match="gallery embedding row 6 holds NaN or infinity"):
        verification(vectors, identity, broken, identity)


def test_a_zero_row_is_named() -> None:
    with pytest.raises(DataError, match="query embedding row 1 is all zeros"):
        unit_rows(np.array([[1, 0], [0, 0]], np.float32), "query")


def test_empty_sides_are_refused() -> None:
    vectors, identity, _ = random_set(13, 5, 2, 1)
    with pytest.raises(DataError, match="gallery embeddings are empty"):
        verification(vectors, identity, vectors[:0], identity[:0])
    with pytest.raises(DataError, match="query embeddings are empty"):
        verification(vectors[:0], identity[:0], vectors, identity)


def test_missing_kinds_of_pairs_are_refused() -> None:
    vectors, _, _ = random_set(14, 6, 2, 1)
    with pytest.raises(DataError, match="no impostor pair among 6 x 6 images"):
        verification(vectors, np.zeros(6, np.int64), vectors, np.zeros(6, np.int64))
    with pytest.raises(DataError, match="no genuine pair"):
        verification(vectors, np.arange(6), vectors, np.arange(6), same_images=True)
    one_group = np.zeros(6, np.int64)
    with pytest.raises(DataError, match="once pairs within one group are left out"):
        verification(
            vectors, np.arange(6) % 2, vectors, np.arange(6) % 2, query_group_Q=one_group, gallery_group_G=one_group
        )
