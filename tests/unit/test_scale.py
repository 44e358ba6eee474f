"""Scores of several generations on one scale: against the definition in float64, and what it is for."""

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.gallery import scale
from pipeline.gallery.index import IndexConfig, Segment
from pipeline.gallery.scale import LEAST
from pipeline.search import Gallery, search_segments
from pipeline.vectors import Vectors
from tests.unit.stamped import drawn, held, stamp, stamped

ALLOWED = held("v2/v1")
FLAT = IndexConfig()


def unit(vectors_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    wide_ND = vectors_ND.astype(np.float64)
    lengths_N1: npt.NDArray[np.float64] = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return wide_ND / lengths_N1


def expected(newest: Vectors, older: Vectors) -> tuple[float, float]:
    """(factor, shift) by the definition, a pair at a time."""
    told = []
    for items in (newest, older):
        cosines = [
            float((unit(one_D[None, : items.stamp.dim]) * unit(other_D[None])).sum())
            for key, identity, one_D in zip(
                newest.keys.to_pylist(), newest.identities.to_pylist(), newest.vectors_ND, strict=True
            )
            for other, its, other_D in zip(
                items.keys.to_pylist(), items.identities.to_pylist(), items.vectors_ND, strict=True
            )
            if key != other and (identity != its or not identity)
        ]
        told.append((np.mean(cosines), np.std(cosines)))
    (mean, deviation), (its_mean, its_deviation) = told
    return float(deviation / its_deviation), float(mean - deviation / its_deviation * its_mean)


def named(vectors: Vectors, identities: int) -> Vectors:
    names = [f"i{place % identities}" if place % 3 else "" for place in range(len(vectors.keys))]
    return stamped(vectors.stamp.generation, vectors.vectors_ND, vectors.keys.to_pylist(), names)


@pytest.mark.parametrize(("sizes", "dims"), [((41, 33), (7, 7)), ((LEAST, 67), (5, 9))])
def test_strangers_of_all_generations_score_alike(sizes: tuple[int, int], dims: tuple[int, int]) -> None:
    old = named(drawn("v1", sizes[0], dims[0], seed=1), 5)
    new = named(drawn("v2", sizes[1], dims[1], seed=2, first=20), 5)
    gallery = Gallery((Segment.of(old, FLAT), Segment.of(new, FLAT)), FLAT)  # some keys in both: pairs left out
    (found,) = gallery.scales.values()
    np.testing.assert_allclose((found.factor, found.shift), expected(new, old), rtol=1e-5)
    assert list(gallery.scales) == [stamp("v1", dims[0]).model_copy(update={"normalised": True})]


def test_scores_are_scaled_and_the_order_within_a_generation_stays() -> None:
    old, new = drawn("v1", 50, 6, seed=1), drawn("v2", 40, 6, seed=2, first=50)
    queries, gallery = drawn("v2", 9, 6, seed=3), Gallery.of([old, new])
    (found,) = gallery.scales.values()
    raw = search_segments(gallery.segments, queries.vectors_ND, 90)
    hits = gallery.search(queries, 90, ALLOWED)
    for row in range(9):
        before = dict(zip(raw.keys_QK[row], raw.scores_QK[row].astype(np.float64), strict=True))
        for key, generation, score in zip(
            hits.keys_QK[row], hits.generations_QK[row], hits.scores_QK[row], strict=True
        ):
            told = before[key] * found.factor + found.shift if generation == "v1" else before[key]
            assert score == pytest.approx(told, abs=1e-6)
        assert (np.diff(hits.scores_QK[row]) <= 0).all()
        of_old = [key for key in hits.keys_QK[row] if key in before and int(key[1:]) < 50]
        assert of_old == [key for key in raw.keys_QK[row] if int(key[1:]) < 50]


def test_however_the_gallery_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SAMPLE", 40)  # fewer than there are
    old, new = drawn("v1", 90, 6, seed=1), drawn("v2", 70, 6, seed=2, first=100)
    one = Gallery.of([old, new])
    order = np.random.default_rng(0).permutation(70)
    parts = [new.take(order[:11]), new.take(order[11:50]), new.take(order[50:])]
    cut = Gallery.of([old])
    for part in parts:
        cut = cut.with_part(Segment.of(part, FLAT))
    assert cut.scales.keys() == one.scales.keys()
    for stamped_, found in cut.scales.items():
        assert found.factor == pytest.approx(one.scales[stamped_].factor)
        assert found.shift == pytest.approx(one.scales[stamped_].shift)


def test_one_generation_and_small_ones_stay_as_they_are() -> None:
    old, new = drawn("v1", 50, 6, seed=1), drawn("v2", LEAST - 1, 6, seed=2, first=50)
    assert Gallery.of([old]).scales == {}
    assert Gallery.of([old, new]).scales == {}, "too few of the newest"
    assert Gallery.of([new.take(np.arange(5)), drawn("v3", 60, 6, seed=4, first=90)]).scales == {}
    assert Gallery.of([old, drawn("v2", 60, 4, seed=2, first=50)]).scales == {}, "fewer dimensions than the older"
    alike = stamped("v1", np.ones((50, 6)), [f"a{place}" for place in range(50)])
    assert Gallery.of([alike, stamped("v2", np.ones((50, 6)))]).scales == {}, "no deviation"
    strangers_none = stamped("v1", np.ones((50, 6)), [f"a{place}" for place in range(50)], ["one"] * 50)
    assert Gallery.of([strangers_none, stamped("v2", np.eye(6)[[0] * 50], identities=["one"] * 50)]).scales == {}


def test_rank1_no_longer_falls_while_a_gallery_moves() -> None:
    """v1 sees a part of what v2 sees, and much that means nothing: cosines towards it are small."""
    rng, count, dim = np.random.default_rng(0), 400, 24
    meaning_ND = unit(rng.standard_normal((count, dim)))
    keys, names = [f"k{place}" for place in range(count)], [f"i{place}" for place in range(count)]

    def vectors(generation: str, kept: float, noise: float) -> Vectors:
        junk_ND = unit(rng.standard_normal((count, dim)))
        seen_ND = unit(meaning_ND + noise * unit(rng.standard_normal((count, dim))))
        return stamped(generation, np.hstack([kept * seen_ND, np.sqrt(1 - kept**2) * junk_ND]), keys, names)

    old, new, queries = vectors("v1", 0.6, 1.0), vectors("v2", 0.98, 0.7), vectors("v2", 0.98, 1.0)

    def rank1(gallery: Gallery, scaled: bool) -> float:
        hits = search_segments(gallery.segments, queries.vectors_ND, 1, gallery.scales if scaled else {})
        return float(np.mean(hits.keys_QK[:, 0] == np.array(keys)))

    start = Gallery.of([old])
    moved = start.with_part(Segment.of(new.take(np.arange(count // 10)), FLAT))
    before = rank1(start, scaled=True)
    assert rank1(moved, scaled=False) < before - 0.05
    assert rank1(moved, scaled=True) >= before
