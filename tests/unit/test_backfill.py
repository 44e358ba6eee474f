"""Partial backfill: a case by hand, both ends, and every share against galleries that are mixed one item at a time."""

from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.backfill import SHARES, _chunks, ambiguity, area, backfill
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.figures import Images
from pipeline.evaluation.measurement import measure
from pipeline.evaluation.settings import EvaluationConfig
from tests.unit.embeddings import GROUP, IDENTITY, embed
from tests.unit.swapped import rank1_by_hand, right_and_wrong

CONFIG = EvaluationConfig(far=(), ranks=(1,), fpir=(0.1,), bootstrap=0)


def test_area_by_hand() -> None:
    assert area([0.2, 0.4, 0.6]) == pytest.approx(0.4)
    assert area([0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert area([0.5] * 11) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [1, 3, 10, 47])
def test_every_item_is_embedded_again_in_one_chunk(count: int) -> None:
    order = np.random.default_rng(0).permutation(count)
    chunks = _chunks(order)
    for step, share in enumerate(SHARES):
        assert (chunks < step).sum() == round(share * count)
        assert set(np.flatnonzero(chunks < step)) == set(order[: round(share * count)])


def two_models() -> tuple[Embeddings, Embeddings]:
    """Ten identities, one enrolled image and one query each.

    The old model has the gallery's items 0 to 4 right and shows 5 to 9 as the neighbour's; the new one is right.
    """
    fields: dict[str, Any] = {
        "identity_N": np.tile(np.arange(10), 2),
        "group_N": np.repeat([0, 1], 10),
        "is_gallery_N": np.repeat([True, False], 10),
    }
    right, wrong = right_and_wrong()
    old = Embeddings(np.vstack([wrong, right]), generation="v1", **fields)
    return Embeddings(np.vstack([right, right]), generation="v2", **fields), old


def test_curve_by_hand() -> None:
    new, old = two_models()
    config = EvaluationConfig(far=(), bootstrap=0, seed=3)
    curves = backfill(new, old, Images.of(new, config), config)
    assert curves["share"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    expected = rank1_by_hand(np.random.default_rng([3, 10]).permutation(10).tolist())
    assert curves["random"]["rank1"] == pytest.approx(expected)
    assert [expected[0], expected[-1]] == [0.5, 1.0]
    assert curves["random"]["area"]["rank1"] == pytest.approx(np.trapezoid(expected, dx=0.1))


def test_ambiguous_items_are_those_near_another_identity() -> None:
    vectors = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0.05]], np.float32)
    old = Embeddings(
        np.vstack([vectors, vectors]),
        np.tile([0, 1, 2, 3, 3], 2),
        np.zeros(10, np.int64),
        np.repeat([True, False], 5),
        "v1",
    )
    found = ambiguity(old, Images.of(old, EvaluationConfig(far=(), bootstrap=0)))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    # Items 3 and 4 are of one identity, and do not make each other ambiguous.
    expected = [cosine[0, 1], cosine[1, 0], cosine[2, 4], cosine[3, 1], cosine[4, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.argsort(-found, kind="stable")[:2].tolist() == [0, 1]


@pytest.mark.parametrize("dims", [(6, 6), (9, 6)])
def test_every_share_is_a_search_of_the_mixed_gallery(dims: tuple[int, int]) -> None:
    new, old = embed("v2", 0.5, dims[0], seed=1), embed("v1", 1.1, dims[1], seed=2)
    curves = backfill(new, old, Images.of(new, CONFIG), CONFIG)
    items, queries = np.flatnonzero(GROUP == 2), np.flatnonzero(GROUP != 2)
    orders = {
        "random": np.random.default_rng([0, len(items)]).permutation(len(items)),
        "uncertainty": np.argsort(-ambiguity(old, Images.of(old, CONFIG)), kind="stable"),
    }

    def cosine(query: int, item: int, renewed: set[int]) -> float:
        gallery = new if item in renewed else old
        a, b = new.vectors_ND[query].astype(float), gallery.vectors_ND[item].astype(float)
        a = a[: len(b)]
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    for name, order in orders.items():
        for step, share in enumerate(SHARES):
            renewed = set(items[order[: round(share * len(items))]].tolist())
            nearest = [max(items, key=lambda item, q=q: cosine(q, item, renewed)) for q in queries]  # type: ignore[misc]
            expected = np.mean(IDENTITY[queries] == IDENTITY[nearest])
            assert curves[name]["rank1"][step] == pytest.approx(expected)
    assert curves["random"]["rank1"] != curves["uncertainty"]["rank1"]


def test_the_ends_are_the_cross_test_and_the_full_backfill() -> None:
    new, old = embed("v2", 0.5, seed=1), embed("v1", 1.1, seed=2)
    measured = measure({"v1": old, "v2": new}, [("v2", "v1"), ("v2", "v2")], CONFIG)
    curves = backfill(new, old, measured.images, CONFIG)
    for name in ("rank1", "tpir@1e-1"):
        for order in ("random", "uncertainty"):
            ends = curves[order][name][0], curves[order][name][-1]
            assert ends == pytest.approx([measured.estimate("v2", old, name).value for old in ("v1", "v2")])
            assert ends[0] < ends[1]


def test_no_curve_without_a_metric_for_it() -> None:
    config = EvaluationConfig(far=(0.1,), ranks=(), bootstrap=0)
    new, old = two_models()
    assert backfill(new, old, Images.of(new, config), config) == {}
