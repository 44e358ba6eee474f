"""Search and its figures against sorted lists in plain Python, and cases worked out by hand."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.evaluation.exact import DENSE, Rows, error_bound, exact_scores
from pipeline.evaluation.identification import (
    SearchOutcomes,
    cmc,
    mean_average_precision,
    rank_k,
    search,
    threshold_at_fpir,
    tpir_at_fpir,
)

Array = npt.NDArray[Any]
Set = tuple[Array, Array, Array]


def cosine(a_D: Array, b_D: Array) -> float:
    """The score of one pair, summed one product at a time in Python floats, then rounded as documented."""
    a, b = [float(x) for x in a_D], [float(x) for x in b_D]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return round(dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(x * x for x in b)) * 2**24) / 2**24


def reference(query: Set, gallery: Set, grouped: bool) -> list[tuple[bool, float, float, int, float]]:
    """Per query (mated, best mate, best other, ahead, average precision), by sorting the whole gallery."""
    outcomes = []
    for q, identity, group in zip(*query, strict=True):
        compared = [
            (cosine(q, g), bool(other == identity))
            for g, other, other_group in zip(*gallery, strict=True)
            if not (grouped and other_group == group)
        ]
        compared.sort(key=lambda item: (-item[0], item[1]))  # equal scores: the stranger (False) first
        mates = [score for score, is_mate in compared if is_mate]
        others = [score for score, is_mate in compared if not is_mate]
        places = [place for place, (_, is_mate) in enumerate(compared, start=1) if is_mate]
        precision = [nth / place for nth, place in enumerate(places, start=1)]
        outcomes.append((
            bool(mates),
            max(mates, default=-math.inf),
            max(others, default=-math.inf),
            places[0] - 1 if places else len(gallery[0]),
            math.fsum(precision) / len(precision) if precision else math.nan,
        ))  # fmt: skip
    return outcomes


def found(query: Set, gallery: Set, grouped: bool, **keywords: Any) -> SearchOutcomes:
    if grouped:
        keywords |= {"query_group_Q": query[2], "gallery_group_G": gallery[2]}
    return search(query[0], query[1], gallery[0], gallery[1], **keywords)


def assert_is(outcomes: SearchOutcomes, expected: list[tuple[bool, float, float, int, float]]) -> None:
    mated, mate, other, ahead, precision = zip(*expected, strict=True)
    np.testing.assert_array_equal(outcomes.mated_Q, mated)
    np.testing.assert_array_equal(outcomes.best_mate_Q, np.array(mate, np.float32))
    np.testing.assert_array_equal(outcomes.best_other_Q, np.array(other, np.float32))
    np.testing.assert_array_equal(outcomes.ahead_Q, ahead)
    np.testing.assert_allclose(outcomes.average_precision_Q, precision, rtol=1e-12)


def random_set(seed: int, count: int, identities: int, groups: int, dim: int = 7, noise: float = 0.8) -> Set:
    random = np.random.default_rng(seed)
    identity = random.integers(identities, size=count)
    centre = np.random.default_rng(99).standard_normal((identities, dim))
    vectors = centre[identity] + noise * random.standard_normal((count, dim))
    return vectors.astype(np.float32), identity, random.integers(groups, size=count)


def outcomes_of(
    mated: list[int], mate: list[float], other: list[float], ahead: list[int], precision: list[float] | None = None
) -> SearchOutcomes:
    return SearchOutcomes(
        np.arange(len(mated)),
        np.array(mated, np.bool_),
        np.array(mate, np.float32),
        np.array(other, np.float32),
        np.array(ahead),
        np.array(precision or [math.nan] * len(mated)),
    )


# Search ---------------------------------------------------------------------------------------------------------


def test_search_by_hand() -> None:
    gallery = np.array([[1, 0], [0, 1], [-1, 0], [1, 1]], np.float32)
    query = np.array([[2, 1], [1, 2], [0, 3], [-9, 0]], np.float32)
    outcomes = search(query, np.array([5, 5, 7, 8]), gallery, np.array([5, 6, 7, 5]))
    np.testing.assert_array_equal(outcomes.identity_Q, [5, 5, 7, 8])
    np.testing.assert_array_equal(outcomes.mated_Q, [True, True, True, False])
    np.testing.assert_allclose(outcomes.best_mate_Q, [3 / 10**0.5, 3 / 10**0.5, 0, -np.inf], rtol=1e-6)
    np.testing.assert_allclose(outcomes.best_other_Q, [1 / 5**0.5, 2 / 5**0.5, 1, 1], rtol=1e-6)
    # The third query: gallery item 1, then item 3, then a tie of its mate (2) with item 0 at a cosine of 0.
    np.testing.assert_array_equal(outcomes.ahead_Q, [0, 0, 3, 4])
    # The second: mate, stranger, mate.
    np.testing.assert_allclose(outcomes.average_precision_Q, [1, (1 + 2 / 3) / 2, 1 / 4, np.nan])
    assert rank_k(outcomes, (1, 3, 4, 9)) == {1: 2 / 3, 3: 2 / 3, 4: 1.0, 9: 1.0}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("chunk_pairs", [1, 17, 100, 1 << 22])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_search_matches_reference_at_every_chunk(chunk_pairs: int, grouped: bool, noise: float) -> None:
    query, gallery = random_set(1, 37, 17, 3, noise=noise), random_set(2, 53, 13, 3, noise=noise)
    expected = reference(query, gallery, grouped)
    outcomes = found(query, gallery, grouped, chunk_pairs=chunk_pairs)
    assert_is(outcomes, expected)
    assert 0 < outcomes.mated_Q.sum() < len(outcomes)
    assert noise < 1 or outcomes.ahead_Q[outcomes.mated_Q].max() > 2  # the case tells ranks apart
    shallow = found(query, gallery, grouped, chunk_pairs=chunk_pairs, average_precision=False)
    assert np.isnan(shallow.average_precision_Q).all()
    for name in ("mated_Q", "best_mate_Q", "best_other_Q", "ahead_Q"):
        np.testing.assert_array_equal(getattr(shallow, name), getattr(outcomes, name))


small_vectors = st.lists(st.integers(-1, 1), min_size=3, max_size=3).filter(any)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_search_matches_reference_with_many_ties(data: st.DataObject) -> None:
    sides = []
    for _ in range(2):
        vectors = np.array(data.draw(st.lists(small_vectors, min_size=1, max_size=8)), np.float32)
        labels = [
            np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(vectors), max_size=len(vectors))))
            for _ in range(2)
        ]
        sides.append((vectors, labels[0], labels[1]))
    grouped, chunk_pairs = data.draw(st.booleans()), data.draw(st.integers(1, 50))
    outcomes = found(sides[0], sides[1], grouped, chunk_pairs=chunk_pairs)
    assert_is(outcomes, reference(sides[0], sides[1], grouped))


def test_near_ties_that_float32_products_cannot_tell_are_decided_exactly() -> None:
    """Items a few 1e-7 apart around the mate, in a dimension where float32 sums are off by as much."""
    random = np.random.default_rng(5)
    query_QD = random.standard_normal((3, 515)).astype(np.float32)
    base_QD = (query_QD + random.standard_normal((3, 515))).astype(np.float32)
    gallery_GD = np.concatenate([base_QD[:1] + np.float32(3e-6) * random.standard_normal((200, 515)), base_QD])
    gallery_GD = gallery_GD.astype(np.float32)
    query_identity, identity = np.array([100, 2, 1]), np.array([*range(200), 2, 3, 4])
    identity[[7, 50, 111]] = 100
    query = (query_QD, query_identity, query_identity)
    gallery = (gallery_GD, identity, identity)
    expected = reference(query, gallery, grouped=False)
    assert 0 < expected[0][3] < 199
    scores = [cosine(query_QD[0], item) for item in gallery_GD[:200]]
    assert max(scores) - min(scores) < error_bound(515)  # all of them are in doubt
    for chunk_pairs in (1, 31, 1000, 1 << 22):
        assert_is(found(query, gallery, False, chunk_pairs=chunk_pairs), expected)


def test_one_embedding_for_every_image_finds_nothing() -> None:
    same = np.full((90, 5), 0.3, np.float32)
    identity = np.arange(90) % 7
    outcomes = search(same[:31], identity[:31], same, identity)
    assert rank_k(outcomes, (1, 77, 78, 79)) == {1: 0.0, 77: 0.0, 78: pytest.approx(27 / 31), 79: 1.0}
    assert outcomes.best_mate_Q.tolist() == outcomes.best_other_Q.tolist() == [1.0] * 31


def test_scale_of_embeddings_does_not_matter() -> None:
    query, gallery = random_set(3, 40, 9, 2), random_set(4, 35, 9, 2)
    scaled = query[0] * np.random.default_rng(0).uniform(1e-12, 1e12, (40, 1)).astype(np.float32)
    faint = gallery[0] * np.float32(1e-30)
    expected = found(query, gallery, True)
    outcomes = found((scaled, *query[1:]), (faint, *gallery[1:]), True)
    np.testing.assert_allclose(outcomes.best_mate_Q, expected.best_mate_Q, atol=1e-6)
    np.testing.assert_array_equal(outcomes.ahead_Q, expected.ahead_Q)


@pytest.mark.parametrize("dim", [1, 7, 512, 2048])
def test_float32_products_lie_within_the_bound(dim: int) -> None:
    random = np.random.default_rng(dim)
    left, right = (Rows.of(random.uniform(0, 1, (count, dim)).astype(np.float32), "x") for count in (61, 83))
    product = left.unit().astype(np.float32) @ right.unit().astype(np.float32).T
    row, column = np.divmod(np.arange(61 * 83), 83)
    off = np.abs(product.ravel() - exact_scores(left, right, row, column).astype(np.float64))
    assert off.max() <= error_bound(dim)


def test_few_pairs_score_as_in_the_whole_product() -> None:
    random = np.random.default_rng(8)
    left, right = (Rows.of(random.standard_normal((count, 129)).astype(np.float32), "x") for count in (67, 41))
    row, column = np.divmod(random.permutation(67 * 41), 41)
    whole = exact_scores(left, right, row, column)
    few = len(row) // DENSE - 1
    np.testing.assert_array_equal(exact_scores(left, right, row[:few], column[:few]), whole[:few])
    assert whole[5] == cosine(left.vectors_ND[row[5]], right.vectors_ND[column[5]])


@pytest.mark.parametrize(
    ("row", "told"), [([np.nan, 1], "query embedding row 1 holds NaN"), ([0, 0], "query embedding row 1 is all zeros")]
)
def test_embeddings_without_direction_are_told(row: list[float], told: str) -> None:
    query = np.array([[1, 2], row, [1, 1]], np.float32)
    with pytest.raises(DataError, match=told):
        search(query, np.arange(3), query[:1], np.arange(1))
    with pytest.raises(DataError, match="gallery embeddings are empty"):
        search(query[:1], np.arange(1), np.empty((0, 2), np.float32), np.empty(0, np.int64))


# Figures --------------------------------------------------------------------------------------------------------


def resampled(outcomes: SearchOutcomes, weight: Array) -> SearchOutcomes:
    """The queries themselves as often as they count."""
    return SearchOutcomes(**{f.name: np.repeat(getattr(outcomes, f.name), weight) for f in fields(outcomes)})


def test_figures_match_plain_sums() -> None:
    query, gallery = random_set(6, 83, 23, 1, noise=1.5), random_set(7, 61, 19, 1, noise=1.5)
    rows = reference(query, gallery, grouped=False)
    outcomes = found(query, gallery, False)
    mated = [row for row in rows if row[0]]
    assert 0 < len(mated) < len(rows)
    shares = [sum(row[3] < k for row in mated) / len(mated) for k in range(1, 12)]
    np.testing.assert_allclose(cmc(outcomes, 11), shares, rtol=1e-12)
    assert len(set(shares)) > 5
    assert rank_k(outcomes, (1, 5, 10)) == {k: pytest.approx(shares[k - 1]) for k in (1, 5, 10)}
    assert mean_average_precision(outcomes) == pytest.approx(sum(row[4] for row in mated) / len(mated))


def test_weights_are_queries_that_count_several_times() -> None:
    outcomes = found(random_set(6, 83, 23, 1), random_set(7, 61, 11, 1), False)
    weight = np.random.default_rng(3).integers(0, 4, 83)
    assert not outcomes.mated_Q[weight == 0].all()
    repeated = resampled(outcomes, weight)
    assert rank_k(outcomes, (1, 3), weight) == pytest.approx(rank_k(repeated, (1, 3)))
    np.testing.assert_allclose(cmc(outcomes, 9, weight), cmc(repeated, 9))
    assert mean_average_precision(outcomes, weight) == pytest.approx(mean_average_precision(repeated))
    for fpir in (0.05, 0.1, 0.37, 1.0):
        assert threshold_at_fpir(outcomes, fpir, weight) == threshold_at_fpir(repeated, fpir)
        assert tpir_at_fpir(outcomes, fpir, weight.astype(np.float64)) == pytest.approx(tpir_at_fpir(repeated, fpir))


def test_tpir_at_fpir_by_hand() -> None:
    # Ten strangers score 0.0 .. 0.9; five mated queries, of which the fourth is not first.
    mate, other = [0.95, 0.85, 0.55, 0.99, 0.81], [0.2, 0.1, 0.3, 0.995, 0.8]
    outcomes = outcomes_of(
        [1] * 5 + [0] * 10,
        mate + [-math.inf] * 10,
        other + [0.1 * i for i in range(10)],
        [0, 0, 0, 1, 0] + [99] * 10,
    )
    assert 0.8 < threshold_at_fpir(outcomes, 0.1) < 0.8000002  # one may be found: 0.9
    assert tpir_at_fpir(outcomes, 0.1) == pytest.approx(3 / 5)
    assert tpir_at_fpir(outcomes, 0.19) == pytest.approx(3 / 5)
    assert tpir_at_fpir(outcomes, 0.5) == pytest.approx(4 / 5)
    assert threshold_at_fpir(outcomes, 1.0) == -math.inf
    assert tpir_at_fpir(outcomes, 1.0) == pytest.approx(4 / 5)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=25), st.integers(1, 100))
def test_threshold_is_the_smallest_that_keeps_the_rate(strangers: list[tuple[int, int]], percent: int) -> None:
    scores, weights = np.array([s / 4 for s, _ in strangers], np.float32), np.array([w for _, w in strangers])
    count = len(scores)
    outcomes = outcomes_of([0] * count, [-math.inf] * count, scores.tolist(), [1] * count)
    if percent * weights.sum() < 100:
        with pytest.raises(DataError, match="whose identity is not enrolled"):
            threshold_at_fpir(outcomes, percent / 100, weights)
        return
    threshold = np.float32(threshold_at_fpir(outcomes, percent / 100, weights))
    assert weights[scores >= threshold].sum() * 100 <= percent * weights.sum()
    if np.isfinite(threshold):
        lower = np.nextafter(threshold, np.float32(-2))
        assert weights[scores >= lower].sum() * 100 > percent * weights.sum()


def test_too_few_strangers_says_how_many_more() -> None:
    outcomes = outcomes_of([1] + [0] * 60, [1.0] + [-math.inf] * 60, [0.0] * 61, [0] + [9] * 60)
    with pytest.raises(DataError, match=r"FPIR 0.01 needs at least 100 .* gives 60: add 40 or") as told:
        tpir_at_fpir(outcomes, 0.01)
    assert "\n" not in str(told.value)
    assert tpir_at_fpir(outcomes, 0.1) == 1.0


def test_a_figure_without_mates_is_an_error() -> None:
    outcomes = outcomes_of([0, 1], [-math.inf, 0.5], [0.1, 0.1], [9, 0], [math.nan, 1.0])
    assert mean_average_precision(outcomes) == 1.0
    nobody = np.array([1, 0])
    for figure in (
        lambda: rank_k(outcomes, (1,), nobody),
        lambda: cmc(outcomes, 3, nobody),
        lambda: mean_average_precision(outcomes, nobody),
        lambda: tpir_at_fpir(outcomes, 1.0, nobody),
    ):
        with pytest.raises(DataError, match="none of the 2 queries has a mate"):
            figure()
