"""Pooling against a loop over templates, and the protocol's tables turned into rows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipeline.data.protocols import SCHEMAS, Protocol
from pipeline.errors import DataError
from pipeline.evaluation.compatibility import Mapped
from pipeline.evaluation.templates import enrol_templates, listed_pairs, pool, pool_templates, searches
from tests.unit.embeddings import GROUP, GROUPS, IDENTITIES, IDENTITY, embed

Array = npt.NDArray[Any]


def loop(vectors: Array, image: Array, template: Array, media: Array, weight: Array) -> dict[int, Array]:
    pooled = {}
    for number in sorted({int(t) for t in template}):
        total = np.zeros(vectors.shape[1])
        for medium in {int(m) for t, m in zip(template, media, strict=True) if t == number}:
            rows = [i for i, t, m in zip(image, template, media, strict=True) if (t, m) == (number, medium)]
            total += sum(vectors[i].astype(np.float64) * weight[i] for i in rows) / len(rows)
        pooled[number] = total / np.sqrt((total * total).sum())
    return pooled


@pytest.mark.parametrize("chunk_images", [1, 7, 50, 8192])
@pytest.mark.parametrize("weighted", [False, True])
def test_pool_matches_a_loop_at_every_chunk(chunk_images: int, weighted: bool) -> None:
    random = np.random.default_rng(chunk_images)
    vectors = random.standard_normal((91, 5)).astype(np.float32)
    image, template = random.integers(91, size=203), random.choice([2, 3, 5, 70, 71, 900], 203, p=[0.4] + [0.12] * 5)
    media = random.integers(6, size=203)
    weight = random.uniform(0.1, 2, 91)
    found, pooled = pool(vectors, image, template, media, weight if weighted else None, chunk_images=chunk_images)
    expected = loop(vectors, image, template, media, weight if weighted else np.ones(91))
    assert found.tolist() == list(expected)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, np.stack(list(expected.values())), atol=1e-6)


def test_a_video_counts_as_much_as_a_still() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)
    template, pooled = pool(vectors, np.arange(4), np.full(4, 8), np.array([4, 9, 9, 9]))
    assert template.tolist() == [8]
    np.testing.assert_allclose(pooled, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_a_medium_of_two_templates_is_two_media() -> None:
    vectors = np.array([[1, 0], [0, 1]], np.float32)
    template, pooled = pool(vectors, np.array([1, 0, 1]), np.array([4, 3, 3]), np.array([6, 6, 5]))
    assert template.tolist() == [3, 4]
    np.testing.assert_allclose(pooled, [[0.5**0.5, 0.5**0.5], [0, 1]], rtol=1e-6)


@pytest.mark.parametrize("broken", [[-1.0, 0.0], [np.nan, 1.0]])
@pytest.mark.parametrize("chunk_images", [1, 100])
def test_a_template_without_direction_is_named(broken: list[float], chunk_images: int) -> None:
    vectors = np.array([[0, 1], [1, 0], broken], np.float32)
    with pytest.raises(DataError, match="template 17 has no direction"):
        pool(vectors, np.arange(3), np.array([5, 17, 17]), np.array([1, 1, 2]), chunk_images=chunk_images)


def test_no_image_is_an_error() -> None:
    nothing = np.empty(0, np.int64)
    with pytest.raises(DataError, match="no template holds an image"):
        pool(np.ones((3, 2), np.float32), nothing, nothing, nothing)


def table(name: str, *rows: tuple[Any, ...]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMAS[name], strict=True)], SCHEMAS[name])


TEMPLATES = table(
    "templates", (30, 1, "c"), (10, 1, "a"), (10, 2, "b"), (20, 1, "a"), (40, 7, "d"), (40, 7, "e"), (50, 1, "e")
)
ROLES = table(
    "template_roles",
    (20, "ann", "gallery", "G1"),
    (30, "bob", "gallery", "G2"),
    (10, "ann", "query", "mixed"),
    (40, "cid", "query", "mixed"),
    (10, "ann", "query", "other"),
)
PAIRS = table("template_pairs", (50, 10, False), (10, 20, True), (30, 20, False))
KEYS = ["e", "d", "c", "unused", "b", "a"]
VECTORS = np.array([[0, 4], [4, 0], [1, 1], [9, 9], [0, 1], [1, 0]], np.float32)


def test_a_protocol_becomes_templates_pairs_and_searches() -> None:
    protocol = Protocol(templates=TEMPLATES, template_pairs=PAIRS, template_roles=ROLES)
    templates = pool_templates(VECTORS, KEYS, protocol)
    assert templates.template_T.tolist() == [10, 20, 30, 40, 50]
    half = 0.5**0.5
    np.testing.assert_allclose(templates.vectors_TD, [[half, half], [1, 0], [half, half], [half, half], [0, 1]])
    ann, also_ann, *others = templates.identity_T.tolist()
    assert ann == also_ann
    assert len({ann, *others}) == 4, "template 50 has no subject, and so an identity of its own"
    pairs, same = listed_pairs(templates, protocol)
    assert pairs.tolist() == [[4, 0], [0, 1], [2, 1]]
    assert same.tolist() == [False, True, False]
    found = {
        name: (query.tolist(), gallery.tolist()) for name, (query, gallery) in searches(templates, protocol).items()
    }
    assert found == {"G1": ([0, 3], [1]), "G2": ([0, 3], [2])}


def test_without_subjects_every_template_is_an_identity() -> None:
    protocol = Protocol(templates=TEMPLATES, template_pairs=PAIRS)
    templates = pool_templates(VECTORS, KEYS, protocol, np.ones(6))
    assert len(set(templates.identity_T.tolist())) == 5
    with pytest.raises(DataError, match="no search of templates"):
        searches(templates, protocol)


def test_what_the_protocol_lacks_is_told() -> None:
    templates = pool_templates(VECTORS, KEYS, Protocol(templates=TEMPLATES))
    with pytest.raises(DataError, match="lists no pairs of templates"):
        listed_pairs(templates, Protocol(templates=TEMPLATES))
    with pytest.raises(DataError, match="2 images of templates are not embedded, such as 'a'"):
        pool_templates(VECTORS[:5], KEYS[:5], Protocol(templates=TEMPLATES))
    pairs = table("pairs", ("a", "b", True))
    with pytest.raises(DataError, match="protocol has no templates"):
        pool_templates(VECTORS, KEYS, Protocol(pairs=pairs))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_fold_of_groups_becomes_templates_of_unit_means_once(groups: int) -> None:
    image = embed("v1", 0.3)
    image = embed("v1", 0.3, mapped={"v0": Mapped("query", image.vectors_ND[:, ::-1].copy())})
    folds, enrolled = enrol_templates(image, groups, seed=3), []
    assert len(folds) == GROUPS // groups
    for found in folds:
        queries = ~found.is_gallery_N
        assert found.is_gallery_N.tolist() == sorted(found.is_gallery_N.tolist()), "templates come last"
        asked = set(found.group_N[queries].tolist())
        enrolled += sorted(set(range(GROUPS)) - asked)
        rest = np.isin(GROUP, sorted(asked))
        np.testing.assert_array_equal(found.vectors_ND[queries], image.vectors_ND[rest])
        np.testing.assert_array_equal(found.identity_N[queries], IDENTITY[rest])
        assert found.identity_N[~queries].tolist() == list(range(IDENTITIES))
        assert set(found.group_N[~queries].tolist()) == {-1}
        turned = found.mapped["v0"].vectors_ND
        for vectors, whole in ((found.vectors_ND, image.vectors_ND), (turned, image.vectors_ND[:, ::-1])):
            unit = whole.astype(np.float64) / np.linalg.norm(whole.astype(np.float64), axis=1, keepdims=True)
            means = np.stack([unit[(row == IDENTITY) & ~rest].mean(axis=0) for row in range(IDENTITIES)])
            wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
            np.testing.assert_allclose(vectors[~queries], wanted, atol=1e-6)
    assert len(enrolled) == len(set(enrolled)) == groups * len(folds)


def test_folds_are_drawn_by_the_seed_and_leave_queries() -> None:
    image = embed("v1", 0.3)
    drawn = {frozenset(enrol_templates(image, 2, seed)[0].group_N.tolist()) for seed in range(8)}
    assert len(drawn) > 1
    for groups in (0, GROUPS):
        with pytest.raises(DataError, match=f"templates of {groups} groups leave no query: .* 5 groups"):
            enrol_templates(image, groups, 0)
