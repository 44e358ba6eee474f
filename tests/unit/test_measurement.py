"""Measured pairs of generations against the protocols done by hand, and the paired draws."""

import math

import numpy as np
import pytest

from pipeline.errors import DataError, GenerationError
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.figures import first_half
from pipeline.evaluation.measurement import Measurements, measure
from pipeline.evaluation.settings import EvaluationConfig, tar_name
from tests.unit.embeddings import GROUP, IDENTITIES, IDENTITY, embed

FAR = EvaluationConfig(far=(0.1, 0.01), ranks=(1, 3), bootstrap=0)


def pair(query: Embeddings, gallery: Embeddings, config: EvaluationConfig = FAR) -> dict[str, float]:
    embedded = {query.generation: query, gallery.generation: gallery}
    measured = measure(embedded, [(query.generation, gallery.generation)], config)
    (one,) = measured.pairs.values()
    return {name: found.value for name, found in one.metrics.items()}


def score_table(query: Embeddings, gallery: Embeddings) -> list[list[float]]:
    dim = gallery.vectors_ND.shape[1]
    q, g = query.vectors_ND[:, :dim].astype(float), gallery.vectors_ND.astype(float)
    return [[float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)) for b in g] for a in q]


def by_hand(query: Embeddings, gallery: Embeddings, far: float, k: int) -> dict[str, float]:
    """The protocol of the quickstart, one pair at a time, in float64."""
    score = score_table(query, gallery)
    count = len(score)
    genuine: list[float] = []
    impostor: list[float] = []
    for i in range(count):
        for j in range(count):
            if i != j and GROUP[i] != GROUP[j]:
                (genuine if IDENTITY[i] == IDENTITY[j] else impostor).append(score[i][j])
    limit = sorted(impostor, reverse=True)[math.floor(far * len(impostor))]
    hits = []
    for i in range(count):
        if GROUP[i] != 2:
            ranking = sorted((j for j in range(count) if GROUP[j] == 2), key=lambda j, i=i: -score[i][j])  # type: ignore[misc]
            hits.append(any(IDENTITY[j] == IDENTITY[i] for j in ranking[:k]))
    return {f"rank{k}": sum(hits) / len(hits), tar_name(far): sum(s > limit for s in genuine) / len(genuine)}


@pytest.mark.parametrize("dims", [(6, 6), (9, 6)])
def test_figures_match_the_protocol_by_hand(dims: tuple[int, int]) -> None:
    new, old = embed("v2", 0.5, dims[0], seed=1), embed("v1", 1.0, dims[1], seed=2)
    found = pair(new, old)
    assert list(found) == ["rank1", "rank3", "tar@1e-1", "tar@1e-2"] == list(FAR.metric_names)
    for far, k in ((0.1, 1), (0.01, 3)):
        for name, value in by_hand(new, old, far, k).items():
            assert found[name] == pytest.approx(value, abs=1e-12)
            assert 0 < value < 1  # the case could have gone otherwise


def test_open_set_is_the_mean_over_two_galleries_by_hand() -> None:
    new, old = embed("v2", 0.5, seed=1), embed("v1", 1.0, seed=2)
    found = pair(new, old, EvaluationConfig(far=(), ranks=(), fpir=(0.1,), bootstrap=0))
    score, first = score_table(new, old), first_half(np.arange(IDENTITIES), np.arange(IDENTITIES), 0)
    rates = []
    for half in (True, False):
        items = [j for j in range(len(score)) if GROUP[j] == 2 and first[IDENTITY[j]] == half]
        queries = [i for i in range(len(score)) if GROUP[i] != 2]
        unmated = [max(score[i][j] for j in items) for i in queries if first[IDENTITY[i]] != half]
        limit = sorted(unmated, reverse=True)[len(unmated) // 10]
        best = [(max(items, key=lambda j, i=i: score[i][j]), i) for i in queries if first[IDENTITY[i]] == half]  # type: ignore[misc]
        rates.append(sum(IDENTITY[j] == IDENTITY[i] and score[i][j] > limit for j, i in best) / len(best))
    assert rates[0] != rates[1]
    assert found == {"tpir@1e-1": pytest.approx(sum(rates) / 2)}


def test_map_by_hand() -> None:
    one = embed("v1", 1.2, seed=2)
    found = pair(one, one, EvaluationConfig(far=(), ranks=(), mean_average_precision=True, bootstrap=0))
    score, precisions = score_table(one, one), []
    for i in np.flatnonzero(GROUP != 2):
        mate = int(np.flatnonzero((GROUP == 2) & (IDENTITY[i] == IDENTITY))[0])
        precisions.append(1 / sum(score[i][j] >= score[i][mate] for j in np.flatnonzero(GROUP == 2)))
    assert found == {"map": pytest.approx(np.mean(precisions))}


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_galleries_halve_the_enrolled_identities(count: int) -> None:
    rows = np.arange(40) * 3
    enrolled = np.repeat(rows[5 : 5 + count], 2)
    half = first_half(rows, enrolled, seed=1)
    assert half.sum() == (count + 1) // 2
    assert set(rows[half]) <= set(enrolled.tolist())
    # Neither the order of the images nor other identities move anybody to the other gallery.
    np.testing.assert_array_equal(first_half(rows[::-1], enrolled[::-1], seed=1), half[::-1])
    assert count < 7 or not np.array_equal(first_half(rows, enrolled, seed=2), half)


def test_query_and_gallery_are_not_interchangeable() -> None:
    new, old = embed("v2", 0.3, seed=1), embed("v1", 1.2, seed=2)
    assert pair(new, old) != pair(old, new)
    assert pair(new, old)["rank1"] > pair(old, old)["rank1"]


def test_a_larger_query_is_cut_to_the_gallery_and_renormalised() -> None:
    old = embed("v1", 0.8, 6, seed=2)
    small = embed("v2", 0.5, 6, seed=1)
    # What follows the old dimensions, however large, must not matter to the old gallery.
    rest = 100 * np.random.default_rng(0).standard_normal((len(IDENTITY), 5)).astype(np.float32)
    wide = embed("v2", 0.5, vectors_ND=np.hstack([small.vectors_ND, rest]))
    assert pair(wide, old) == pair(small, old)
    assert pair(wide, wide) != pair(small, small)
    with pytest.raises(GenerationError, match="queries of v1 have 6 dimensions"):
        pair(old, wide)


def test_a_search_needs_both_roles() -> None:
    enrolled = embed("v1", 0.5, is_gallery_N=np.ones(len(IDENTITY), np.bool_))
    with pytest.raises(DataError, match="60 enrolled images and 0 queries"):
        pair(enrolled, enrolled)
    assert list(pair(enrolled, enrolled, EvaluationConfig(ranks=(), far=(0.1,), bootstrap=0))) == ["tar@1e-1"]


def test_rates_that_the_test_set_is_too_small_for() -> None:
    one = embed("v1", 0.5)
    with pytest.raises(DataError, match=r"FAR 0\.0001 needs at least 10000 impostor pairs, .* gives 2640"):
        pair(one, one, EvaluationConfig(far=(1e-4,), bootstrap=0))
    with pytest.raises(DataError, match=r"FPIR 0\.001 needs at least 1000 queries"):
        pair(one, one, EvaluationConfig(fpir=(1e-3,), bootstrap=0))
    single = embed("v1", 0.5, is_gallery_N=(GROUP == 2) & (IDENTITY == 3))
    with pytest.raises(DataError, match="two enrolled identities"):
        pair(single, single, EvaluationConfig(fpir=(0.1,), bootstrap=0))


def family(config: EvaluationConfig, pairs: list[tuple[str, str]], det: bool = False) -> Measurements:
    embedded = {"v1": embed("v1", 1.0, seed=1), "v2": embed("v2", 0.6, seed=2)}
    return measure(embedded, pairs, config, det)


def test_a_pair_does_not_depend_on_the_others_measured_with_it() -> None:
    config = EvaluationConfig(far=(0.1,), fpir=(0.1,), bootstrap=50)
    several = family(config, [("v2", "v1"), ("v2", "v2"), ("v1", "v1")])
    assert list(several.pairs) == ["v2/v1", "v2/v2", "v1/v1"]
    alone = family(config, [("v2", "v1")])
    for name in config.metric_names:
        np.testing.assert_array_equal(
            several.estimate("v2", "v1", name).replicates_R, alone.estimate("v2", "v1", name).replicates_R
        )
    assert alone["v2/v1"].far_at_old == {}
    assert several["v1/v1"].far_at_old == {}
    assert "v1/v1" not in alone
    with pytest.raises(DataError, match="pair v1/v1 was not measured; measured are v2/v1"):
        alone.estimate("v1", "v1", "rank1")


def test_old_threshold_on_the_new_queries_by_hand() -> None:
    measured = family(EvaluationConfig(far=(0.1,), bootstrap=20), [("v1", "v1"), ("v2", "v1")])
    old = measured["v1/v1"].thresholds["far@1e-1"]
    new, gallery = embed("v2", 0.6, seed=2), embed("v1", 1.0, seed=1)
    score = score_table(new, gallery)
    impostor = [
        score[i][j] for i in range(60) for j in range(60) if GROUP[i] != GROUP[j] and IDENTITY[i] != IDENTITY[j]
    ]
    found = measured["v2/v1"].far_at_old["far@1e-1"]
    assert found.value == pytest.approx(sum(one >= old.value for one in impostor) / len(impostor))
    assert found.value != pytest.approx(0.1, abs=1e-3)
    assert found.replicates_R.shape == old.replicates_R.shape == (20,)
    # Restoring: at the pair's own threshold the rate is the one asked for.
    restored = measured["v2/v1"].thresholds["far@1e-1"].value
    assert sum(one >= restored for one in impostor) == math.floor(0.1 * len(impostor))


def test_intervals_hold_their_values_and_can_be_left_out() -> None:
    measured = family(EvaluationConfig(far=(0.1,), bootstrap=200), [("v2", "v1")], det=True)
    for found in measured["v2/v1"].metrics.values():
        low, high = found.interval() or (math.nan, math.nan)
        assert low < found.value < high
    det = measured["v2/v1"].det
    assert det is not None
    assert (det.low_J <= det.high_J).all()
    assert (det.low_J < det.high_J).mean() > 0.8
    frr_J = np.interp(det.band_far_J, det.far_K, det.frr_K)
    assert ((det.low_J <= frr_J + 1e-9) & (frr_J <= det.high_J + 1e-9)).all()
    bare = family(EvaluationConfig(far=(0.1,), bootstrap=0), [("v1", "v1"), ("v2", "v1")], det=True)["v2/v1"]
    assert all(found.interval() is None for found in bare.metrics.values())
    assert bare.far_at_old["far@1e-1"].interval() is None
    assert bare.det is not None
    assert bare.det.band_far_J.size == 0
