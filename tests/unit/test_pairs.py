"""Listed pairs against one loop over them, and TAR@FAR against the rule of metrics and cases worked out by hand."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.pairs import cross_verify, score_pairs, tar_at_fars, verification_scores
from pipeline.evaluation.verification import verification

Array = npt.NDArray[Any]


def cosine(a_D: Array, b_D: Array) -> float:
    a, b = [float(x) for x in a_D], [float(x) for x in b_D]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return round(dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(x * x for x in b)) * 2**24) / 2**24


def loop(left: Array, right: Array, pairs: Array) -> list[float]:
    return [cosine(left[first], right[second]) for first, second in pairs]


def vectors(seed: int, count: int, dim: int = 9) -> Array:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize("chunk_pairs", [1, 19, 350, 1 << 21])
@pytest.mark.parametrize("listed", [1, 41, 3000])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_scores_match_a_loop_whatever_the_block(chunk_pairs: int, listed: int, kind: type) -> None:
    left, right = vectors(1, 61), vectors(2, 83)
    random = np.random.default_rng(listed)
    pairs: Array = np.stack([random.integers(61, size=listed), random.integers(83, size=listed)], axis=1).astype(kind)
    scores = score_pairs(left, right, pairs, chunk_pairs=chunk_pairs)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.array(loop(left, right, pairs), np.float32))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_scores_match_a_loop_for_any_list(data: st.DataObject) -> None:
    left, right = vectors(3, 7, 3), vectors(4, 5, 3)
    one = st.tuples(st.integers(0, 6), st.integers(0, 4))
    pairs: Array = np.array(data.draw(st.lists(one, min_size=1, max_size=60)))
    scores = score_pairs(left, right, pairs, chunk_pairs=data.draw(st.integers(1, 40)))
    np.testing.assert_array_equal(scores, np.array(loop(left, right, pairs), np.float32))


def test_rows_that_no_pair_names_cost_nothing_and_change_nothing() -> None:
    left, right = vectors(5, 200), vectors(6, 300)
    pairs = np.array([[199, 0], [3, 299], [199, 299], [3, 0]])
    expected = loop(left, right, pairs)
    np.testing.assert_array_equal(score_pairs(left, right, pairs, chunk_pairs=4), np.array(expected, np.float32))


def test_more_than_65536_blocks_are_kept_apart() -> None:
    left, right = vectors(7, 300), vectors(8, 301)
    random = np.random.default_rng(0)
    pairs = np.stack([random.permutation(300), random.integers(301, size=300)], axis=1)
    pairs = np.concatenate([pairs, np.stack([random.integers(300, size=301), random.permutation(301)], axis=1)])
    expected = np.array(loop(left, right, pairs), np.float32)
    np.testing.assert_array_equal(score_pairs(left, right, pairs, chunk_pairs=1), expected)  # 90,300 blocks of one pair


def test_a_list_without_pairs_is_an_error() -> None:
    with pytest.raises(DataError, match="no pair is listed"):
        score_pairs(vectors(0, 3), vectors(0, 3), np.empty((0, 2), np.int64))
    with pytest.raises(DataError, match="none of the 2 listed pairs is of two identities"):
        tar_at_fars(np.zeros(2, np.float32), np.ones(2, np.bool_), (0.1,))
    with pytest.raises(DataError, match="none of the 2 listed pairs is of one identity"):
        tar_at_fars(np.zeros(2, np.float32), np.zeros(2, np.bool_), (0.1,))


def test_tar_at_fars_by_hand() -> None:
    impostor = np.arange(100) / 100  # 0.00 .. 0.99
    genuine = np.array([0.895, 0.905, 0.985, 0.99, 0.995, 0.5, 0.2, 0.3, 0.4, 0.985])
    scores, same = np.append(impostor, genuine).astype(np.float32), np.arange(110) >= 100
    shuffled = np.random.default_rng(1).permutation(110)
    # 10 % may pass: 0.90 .. 0.99, so 0.895 is accepted too; 1 %: 0.99 alone, so 0.985 too.
    found = tar_at_fars(scores[shuffled], same[shuffled], (0.1, 0.01, 1.0))
    assert found == {0.1: pytest.approx(0.6), 0.01: pytest.approx(0.4), 1.0: 1.0}
    with pytest.raises(DataError, match=r"FAR 0\.001 needs at least 1000 impostor pairs"):
        tar_at_fars(scores, same, (0.1, 0.001))


@pytest.mark.parametrize("fars", [(0.2, 0.01), (1e-3,)])
def test_listing_every_pair_gives_what_verification_gives(fars: tuple[float, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.evaluation.pairs.TAIL", 5)  # so that the FARs decide the tail
    random = np.random.default_rng(2)
    identity = random.integers(9, size=79)
    left = (random.standard_normal((9, 6))[identity] + 0.7 * random.standard_normal((79, 6))).astype(np.float32)
    pairs = np.argwhere(~np.eye(79, dtype=np.bool_))
    scores = score_pairs(left, left, pairs)
    same = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    whole = verification(left, identity, left, identity, same_images=True)
    listed = verification_scores(scores, same, fars)
    assert listed.impostors == whole.impostors > len(listed.impostor_tail_T)
    np.testing.assert_array_equal(listed.genuine_P, whole.genuine_P)
    np.testing.assert_array_equal(listed.impostor_tail_T, whole.impostor_tail_T[: len(listed.impostor_tail_T)])
    below = [np.count_nonzero(scores[~same] < edge) for edge in (-0.5, 0, 0.25)]
    assert [listed.impostor_histogram_B[:bin_].sum() for bin_ in (512, 1024, 1280)] == below
    found = tar_at_fars(scores, same, fars)
    assert found == {far: metrics.tar_at_far(whole, far) for far in fars}
    assert 0 < min(found.values()) < 1


def test_each_direction_has_the_new_model_on_its_own_side() -> None:
    # Old embeddings are the axes; the new model confuses item 1 with item 0 and leaves item 0 where it is.
    old = np.eye(3, dtype=np.float32)
    new = np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1]], np.float32)
    pairs, same = np.array([[0, 1], [2, 1], [2, 0], [0, 2]]), np.array([True, False, False, False])
    both = cross_verify(new, old, pairs, same, (0.34,))
    assert both.new_first == {0.34: 0.0}  # new 0 on old 1: cosine 0, as the impostors'
    assert both.new_second == {0.34: 1.0}  # old 0 on new 1: near 1
