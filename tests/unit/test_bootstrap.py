"""Resampling identities against plain loops that repeat pairs and queries as often as they are drawn."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import bootstrap, metrics
from pipeline.evaluation.bootstrap import Estimate, Resampling, WeightedTail, difference, gain
from pipeline.evaluation.figures import open_set_of, tar_replicates
from pipeline.evaluation.identification import SearchOutcomes, search, tpir_at_fpir
from pipeline.evaluation.verification import verification

Array = npt.NDArray[Any]
FARS = (0.2, 0.05, 0.01)


def random_set(seed: int, count: int = 37, identities: int = 7, groups: int = 3, dim: int = 5) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    identity = random.permutation(np.arange(count) % identities)
    centre = random.standard_normal((identities, dim))
    vectors = (centre[identity] + 0.7 * random.standard_normal((count, dim))).astype(np.float32)
    return {"vectors": vectors, "identity": identity, "group": random.integers(groups, size=count)}


def verified(query: dict[str, Array], gallery: dict[str, Array], tail: int) -> metrics.VerificationScores:
    return verification(
        query["vectors"],
        query["identity"],
        gallery["vectors"],
        query["identity"],
        query_group_Q=query["group"],
        gallery_group_G=query["group"],
        same_images=True,
        tail=tail,
    )


def repeated(query: dict[str, Array], gallery: dict[str, Array], weight: Array) -> tuple[list[float], list[float]]:
    """Genuine and impostor scores of one replicate, each as often as it counts, one pair at a time."""
    whole = verified(query, gallery, 10_000)
    assert whole.tail_query_T is not None
    assert whole.tail_gallery_T is not None
    assert whole.genuine_identity_P is not None
    genuine, impostor = [], []
    for score, i in zip(whole.genuine_P.tolist(), whole.genuine_identity_P, strict=True):
        genuine += [score] * int(weight[i])
    for score, i, j in zip(whole.impostor_tail_T.tolist(), whole.tail_query_T, whole.tail_gallery_T, strict=True):
        impostor += [score] * (int(weight[i]) * int(weight[j]))
    return genuine, impostor


def scores_of(genuine: list[float], impostor: list[float]) -> metrics.VerificationScores:
    impostor_P = np.array(impostor, np.float32)
    histogram_B = np.histogram(impostor_P, metrics.BINS, (-1, 1))[0].astype(np.int64)
    return metrics.VerificationScores(
        np.sort(np.array(genuine, np.float32)), np.sort(impostor_P)[::-1], histogram_B, impostor_P.size
    )


@pytest.mark.parametrize("self_test", [True, False])
@pytest.mark.parametrize("span", [1, 7, 128])
def test_tar_of_each_replicate_is_that_of_the_repeated_pairs(
    self_test: bool, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "SPAN", span)
    query = random_set(1)
    gallery = query if self_test else query | {"vectors": random_set(2)["vectors"] + query["vectors"]}
    resampling = Resampling.draw(7, 23, seed=5)
    scores = verified(query, gallery, 700)
    assert scores.impostors > 700
    total_R = resampling.impostor_weight(query["identity"], query["group"])
    tail = WeightedTail(scores, resampling, total_R)
    for far in FARS:
        threshold_R = tail.threshold(far)
        tar_R, far_R = tar_replicates(scores, resampling, threshold_R), tail.far(threshold_R)
        for replicate in range(23):
            genuine, impostor = repeated(query, gallery, resampling.weight_IR[:, replicate])
            assert total_R[replicate] == len(impostor)
            expected = scores_of(genuine, impostor)
            assert threshold_R[replicate] == np.float32(metrics.threshold_at_far(expected, far))
            assert tar_R[replicate] == pytest.approx(metrics.tar_at_far(expected, far))
            assert far_R[replicate] == pytest.approx(np.mean(np.array(impostor) >= threshold_R[replicate]))
        assert len(set(tar_R)) > 5  # the draws do differ


def test_a_threshold_below_the_tail_is_not_known() -> None:
    query = random_set(3)
    resampling = Resampling.draw(7, 9, seed=5)
    total_R = resampling.impostor_weight(query["identity"], query["group"])
    tail = WeightedTail(verified(query, query, 100), resampling, total_R)
    assert np.isnan(tail.far(np.full(9, -0.5, np.float32))).all()
    assert not np.isnan(tail.far(np.full(9, 0.999, np.float32))).any()
    whole = WeightedTail(verified(query, query, 10_000), resampling, total_R)
    np.testing.assert_allclose(whole.far(np.full(9, -2, np.float32)), 1.0)
    assert (whole.threshold(1.0) == -np.inf).all()


def test_a_long_tail_is_thinned_and_stays_close(monkeypatch: pytest.MonkeyPatch) -> None:
    query = random_set(4, count=400, identities=60, groups=4)
    resampling = Resampling.draw(60, 31, seed=1)
    total_R = resampling.impostor_weight(query["identity"], query["group"])
    scores = verified(query, query, 60_000)
    exact_R = tar_replicates(scores, resampling, WeightedTail(scores, resampling, total_R).threshold(0.1))
    monkeypatch.setattr(bootstrap, "LIMIT", 20_000)
    thinned = WeightedTail(scores, resampling, total_R)
    near_R = tar_replicates(scores, resampling, thinned.threshold(0.1))
    assert not np.array_equal(exact_R, near_R)
    assert np.abs(exact_R - near_R).mean() < 0.25 * np.std(exact_R)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 4), st.integers(0, 1000))
def test_weight_of_all_impostors(identities: int, count: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    identity, group = random.integers(identities, size=count), random.integers(groups, size=count)
    resampling = Resampling.draw(identities, 3, seed)
    for replicate, found in enumerate(resampling.impostor_weight(identity, group)):
        weight = resampling.weight_IR[:, replicate].astype(int)
        assert found == sum(
            weight[identity[a]] * weight[identity[b]]
            for a in range(count)
            for b in range(count)
            if identity[a] != identity[b] and group[a] != group[b]
        )


def test_draws_are_of_all_identities_and_depend_on_the_seed_alone() -> None:
    first = Resampling.draw(9, 50, seed=3)
    assert (first.weight_IR.sum(axis=0) == 9).all()
    assert first.weight_IR.max() > 1
    np.testing.assert_array_equal(first.weight_IR, Resampling.draw(9, 50, seed=3).weight_IR)
    assert not np.array_equal(first.weight_IR, Resampling.draw(9, 50, seed=4).weight_IR)
    np.testing.assert_array_equal(first.first(7).weight_IR, first.weight_IR[:, :7])


def test_shares_of_items_are_weighted_by_identity() -> None:
    resampling = Resampling(np.array([[1, 2, 0], [1, 0, 2]], np.uint16))
    identity = np.array([0, 0, 0, 1])
    counted = np.array([1, 1, 0, 1])
    found = resampling.share_of_items(np.array([1, 0, 1, 1]), identity, counted)
    assert found.value == pytest.approx(2 / 3)
    np.testing.assert_allclose(found.replicates_R, [2 / 3, 1 / 2, 1.0])
    nobody = resampling.share_of_items(np.array([1, 0, 1, 1]), identity, np.array([1, 1, 1, 0]))
    assert math.isnan(nobody.replicates_R[2])  # of this draw no item is left
    assert nobody.to_json() == pytest.approx({"value": 2 / 3, "low": 2 / 3, "high": 2 / 3})


def test_open_set_replicates_are_those_of_weighted_queries() -> None:
    query, gallery = random_set(6, count=90, identities=18), random_set(7, count=11, identities=11)
    gallery["vectors"] = gallery["vectors"] + query["vectors"][:11]
    resampling = Resampling.draw(18, 40, seed=2)
    outcomes: SearchOutcomes = search(
        query["vectors"], query["identity"], gallery["vectors"], query["identity"][:11], average_precision=False
    )
    assert 0 < outcomes.mated_Q.sum() < 90
    for fpir in (0.1, 0.4):
        found = open_set_of([outcomes, outcomes], resampling, fpir)
        assert found.value == tpir_at_fpir(outcomes, fpir)
        expected = [tpir_at_fpir(outcomes, fpir, resampling.weight_IR[outcomes.identity_Q, one]) for one in range(40)]
        np.testing.assert_allclose(found.replicates_R, expected)
        assert len(set(expected)) > 5


# Estimates ------------------------------------------------------------------------------------------------------


def test_interval_is_of_percentiles() -> None:
    hundred = Estimate(0.5, np.arange(101) / 100)
    assert hundred.interval() == (0.02, 0.98)  # 2.5 lies between two replicates: the outer one
    assert hundred.to_json() == {"value": 0.5, "low": 0.02, "high": 0.98}
    assert Estimate(0.5, np.array([0.3, np.nan, 0.4])).interval() == (0.3, 0.4)
    for none in (np.empty(0), np.full(3, np.nan)):
        assert Estimate(0.5, none).to_json() == {"value": 0.5, "low": None, "high": None}
    assert Estimate(0.5, np.array([0.3, np.inf])).to_json() == {"value": 0.5, "low": 0.3, "high": None}


def test_difference_is_paired() -> None:
    shaky = np.random.default_rng(0).uniform(0.2, 0.8, 200)
    found = difference(Estimate(0.6, shaky + 0.1), Estimate(0.5, shaky))
    assert found.value == pytest.approx(0.1)
    assert found.to_json() == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})


def test_gain_of_replicates() -> None:
    cross, old = Estimate(0.6, np.array([0.6, 0.5, 0.7, 0.3])), Estimate(0.5, np.array([0.5, 0.5, 0.6, 0.4]))
    paragon = Estimate(0.7, np.array([0.7, 0.9, 0.6, 0.4]))
    found = gain(cross, old, paragon)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    # Where the paragon is no better there is no finite gain, only a side.
    np.testing.assert_allclose(found.replicates_R, [0.5, 0.0, np.inf, -np.inf])
    assert gain(Estimate(0.5, cross.replicates_R), old, paragon) is None
    assert gain(cross, old, Estimate(0.5, paragon.replicates_R)) is None
