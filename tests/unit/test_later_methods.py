"""The later methods' configs, and the statistics of old features that they stand on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat import means
from pipeline.compat.means import class_means, class_spread, image_weights, refined_means
from pipeline.compat.methods import METHODS, CompatConfig
from pipeline.compat.methods.bct import Bct

DIM, FIRST, END = 5, 10, 17
ROWS = torch.tensor([12, 10, 16, 12, 12, 13, 10, 12, 10, 12, 16, 10, 12])  # 11, 14 and 15 have no image
IMAGES = torch.randn(len(ROWS), DIM, generator=torch.Generator().manual_seed(2))


def images_of(first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    inside = (first <= ROWS) & (end > ROWS)
    yield from zip(IMAGES[inside].split(4), ROWS[inside].split(4), strict=True)


def parsed(**keys: Any) -> Any:
    return TypeAdapter(CompatConfig).validate_python(keys)


@pytest.mark.parametrize("name", ["ract", "nccl", "lce", "advbct", "mixbct", "unibct"])
def test_each_method_is_found_by_its_name(name: str) -> None:
    method = parsed(method=name)
    assert type(method) is METHODS[name]
    assert method.takes_parents
    assert type(parsed()) is Bct


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "ract", "temperature": 0}, "greater than 0"),
        ({"method": "ract", "negatives": "new"}, "'old and new' or 'old'"),
        ({"method": "nccl", "negatives": "old"}, "Extra inputs"),
        ({"method": "lce", "boundary": "median"}, "'furthest' or 'mean'"),
        ({"method": "lce", "boundary_weight": 0.0}, "greater than 0"),
        ({"method": "advbct", "elasticity": 1.5}, "less than or equal to 1"),
        ({"method": "advbct", "threshold": 2.0}, "less than 2"),
        ({"method": "advbct", "reversal": -1.0}, "greater than or equal to 0"),
        ({"method": "mixbct", "share": 1.0}, "less than 1"),
        ({"method": "mixbct", "weight": 0.3}, "no lambda"),
        ({"method": "mixbct", "warmup": 0.3}, "no lambda"),
        ({"method": "mixbct", "nearest": 0.0}, "greater than 0"),
        ({"method": "unibct", "walk": 1.0}, "less than 1"),
    ],
)
def test_what_a_method_cannot_do_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        parsed(**keys)


def test_statistics_are_asked_for_only_where_they_are_used() -> None:
    asked = {
        (name, *keys.values()): (parsed(method=name, **keys).asks_means, parsed(method=name, **keys).asks_spread)
        for name, keys in (
            ("ract", {}),
            ("lce", {}),
            ("lce", {"boundary": "mean"}),
            ("advbct", {}),
            ("mixbct", {}),
            ("mixbct", {"nearest": None}),
            ("unibct", {}),
        )
    }
    assert asked == {
        ("ract",): (False, None),
        ("lce",): (True, 1.0),
        ("lce", "mean"): (True, None),
        ("advbct",): (True, 1.0),
        ("mixbct",): (True, 0.9),
        ("mixbct", None): (False, None),
        ("unibct",): (True, None),
    }


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_spread_is_the_cosine_that_a_share_of_the_images_reach(share: float) -> None:
    means_CD = class_means(nn.Identity(), images_of(FIRST, END), FIRST, END, DIM)
    found_C = class_spread(nn.Identity(), images_of(FIRST, END), means_CD, FIRST, share)
    for row in range(FIRST, END):
        own = F.normalize(IMAGES[row == ROWS].double())
        expected = 1.0
        if len(own):
            cosines = sorted((own @ F.normalize(own.mean(dim=0), dim=0)).tolist(), reverse=True)
            expected = next(c for k, c in enumerate(cosines, 1) if k >= share * len(own))
        assert found_C[row - FIRST] == pytest.approx(expected, abs=1e-6)


def test_image_weights_are_those_of_the_refined_features_mean() -> None:
    unit = F.normalize(IMAGES[ROWS == 12].double())
    edges = torch.zeros(len(unit), len(unit), dtype=torch.float64)
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if j != i]
        edges[i, others] = torch.softmax(unit[others] @ unit[i] / 0.3, dim=0)
    refined, step = torch.zeros_like(unit), unit.clone()
    for k in range(600):  # the walk itself: (1 - a) sum of a^k E^k V
        refined += 0.1 * 0.9**k * step
        step = edges @ step
    weights = image_weights(unit, 0.9, 0.3)
    torch.testing.assert_close(weights @ unit, refined.mean(dim=0))
    assert weights.sum() == pytest.approx(1.0)


def test_an_outlier_counts_less() -> None:
    unit = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [1.0, -0.1, 0.0], [-1.0, 0.3, 0.2]]))
    weights = image_weights(unit, 0.9, 0.05)
    assert weights[3] < 0.1 < weights[:3].min()


def test_refined_means_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = refined_means(nn.Identity(), images_of, FIRST, END, DIM, "cpu", 0.8, 0.2)
    monkeypatch.setattr(means, "REFINED_IDENTITIES", 2)
    torch.testing.assert_close(refined_means(nn.Identity(), images_of, FIRST, END, DIM, "cpu", 0.8, 0.2), whole)
    for row in range(FIRST, END):
        own = F.normalize(IMAGES[row == ROWS])
        expected = image_weights(own, 0.8, 0.2) @ own if len(own) else torch.zeros(DIM)
        torch.testing.assert_close(whole[row - FIRST], expected)
    monkeypatch.setattr(means, "REFINED_IMAGES", 1)  # each image a graph of its own: the plain mean
    plain = class_means(nn.Identity(), images_of(FIRST, END), FIRST, END, DIM)
    torch.testing.assert_close(refined_means(nn.Identity(), images_of, FIRST, END, DIM, "cpu", 0.8, 0.2), plain)
