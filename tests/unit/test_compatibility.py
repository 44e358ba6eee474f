"""The criterion, the update gain, average compatibility, what is compared with what, and the config."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import DataError, GenerationError
from pipeline.evaluation.compatibility import (
    average_compatibility,
    comparable_query,
    compared_scores,
    criterion,
    update_gain,
)
from pipeline.evaluation.settings import EvaluationConfig, rate_name, tar_name, tpir_name
from tests.unit.embeddings import GROUP, IDENTITY, embed


def test_a_larger_query_is_cut_to_the_gallery() -> None:
    small, old = embed("v2", 0.5, 6, seed=1), embed("v1", 0.8, 4, seed=2)
    np.testing.assert_array_equal(comparable_query(small, old), small.vectors_ND[:, :4])


def test_a_smaller_query_is_an_error() -> None:
    with pytest.raises(GenerationError, match="queries of v2 have 4 dimensions, the gallery of v1 has 6"):
        compared_scores(embed("v2", 0.5, 4), embed("v1", 0.5, 6))


def test_other_images_or_another_order_trip_an_assertion() -> None:
    first = embed("v1", 0.5)
    for field, value in (("identity_N", IDENTITY[::-1].copy()), ("group_N", GROUP + 1), ("is_gallery_N", GROUP == 1)):
        with pytest.raises(AssertionError, match=f"same images in the same order .{field}"):
            compared_scores(embed("v2", 0.5, **dict[str, Any]({field: value})), first)


def test_pairs_of_one_typeface_and_of_one_image_are_not_compared() -> None:
    one = embed("v1", 0.5)
    # 60 * 60 ordered pairs, less those of one typeface, less genuine ones: 12 * 11 * 5 * 4 impostors.
    scores = compared_scores(one, one)
    assert scores.impostors == len(scores.impostor_tail_T) == 2640
    assert scores.genuine_P.size == 12 * 5 * 4


def test_the_tail_is_as_long_as_a_far_and_its_replicates_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.compatibility.LEAST_TAIL", 3)
    one = embed("v1", 0.5)
    assert len(compared_scores(one, one).impostor_tail_T) == 3
    assert len(compared_scores(one, one, (0.01, 0.1)).impostor_tail_T) == 2 * 360 + 2
    assert len(compared_scores(one, one, (0.9,)).impostor_tail_T) == 2640


def test_embeddings_name_the_generation_and_the_row() -> None:
    vectors = embed("v1", 0.5).vectors_ND.copy()
    vectors[17, 2] = np.nan
    with pytest.raises(DataError, match="generation v7: embedding row 17 holds NaN"):
        embed("v7", 0.5, vectors_ND=vectors)
    with pytest.raises(AssertionError, match="group_N has shape"):
        embed("v7", 0.5, group_N=GROUP[:-1])


# Criterion and gain ---------------------------------------------------------------------------------------------


def test_criterion_is_strict_and_on_every_metric() -> None:
    old = {"rank1": 0.3, "tar@1e-3": 0.2}
    assert criterion({"rank1": 0.31, "tar@1e-3": 0.21}, old)
    assert not criterion({"rank1": 0.31, "tar@1e-3": 0.2}, old)
    assert not criterion({"rank1": 0.29, "tar@1e-3": 0.9}, old)
    assert not criterion({"rank1": math.nan, "tar@1e-3": 0.9}, old)
    with pytest.raises(AssertionError, match="metrics differ"):
        criterion({"rank1": 0.5}, old)
    with pytest.raises(AssertionError):
        criterion({}, {})


@pytest.mark.parametrize(
    ("cross", "old", "paragon", "gain"),
    [
        # The sketch of the small quickstart profile: rank-1, then TAR@1e-3.
        (0.291, 0.270, 0.382, 0.1875),
        (0.187, 0.185, 0.259, 0.027027),
        (0.75, 0.5, 1.0, 0.5),
        (0.9, 0.5, 0.7, 2.0),
        (0.5, 0.5, 0.7, None),
        (0.4, 0.5, 0.7, None),
        (0.6, 0.5, 0.5, None),
        (0.6, 0.5, 0.4, None),
        (math.nan, 0.5, 0.7, None),
    ],
)
def test_update_gain_by_hand(cross: float, old: float, paragon: float, gain: float | None) -> None:
    found = update_gain(cross, old, paragon)
    assert found == (None if gain is None else pytest.approx(gain, abs=1e-6))


# Shen et al. 2020, IJB-C: the gains printed for beta, beta-kd and beta-sys are these shares of points: M(new, old) less
# M(old, old), of M(paragon, paragon) less M(old, old). In two decimals, as the paper prints accuracies, no other
# denominators below 13 (1:1, TAR@FAR=1e-4) and below 20 (1:N, TPIR@FPIR=1e-2) give all three gains.
@pytest.mark.parametrize(
    ("above", "room", "printed"),
    [
        (2.39, 9.10, 26.26),
        (2.48, 9.10, 27.25),
        (2.73, 9.10, 30.00),
        (4.75, 10.56, 44.98),
        (5.82, 10.56, 55.11),
        (6.84, 10.56, 64.77),
    ],
)
def test_gains_of_the_paper(above: float, room: float, printed: float) -> None:
    old = 0.7786
    gain = update_gain(old + above / 100, old, old + room / 100)
    assert gain is not None
    assert round(100 * gain, 2) == printed


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_gain_is_positive_and_one_at_the_paragon(cross: float, old: float, paragon: float) -> None:
    gain = update_gain(cross, old, paragon)
    assert (gain is not None) == (criterion({"m": cross}, {"m": old}) and paragon > old)
    assert gain is None or gain > 0
    assert paragon <= old or update_gain(paragon, old, paragon) == 1


def test_average_compatibility_by_hand() -> None:
    values = {("v1", "v1"): 0.3, ("v2", "v2"): 0.5, ("v3", "v3"): 0.6, ("v2", "v1"): 0.4, ("v3", "v2"): 0.5}
    # v2/v1 is above v1/v1; v3/v2 is only equal to v2/v2; v3/v1 cannot be compared.
    assert average_compatibility(values, ["v1", "v2", "v3"]) == pytest.approx(1 / 3)
    assert average_compatibility(values | {("v3", "v1"): 0.31}, ["v1", "v2", "v3"]) == pytest.approx(2 / 3)
    assert average_compatibility(values, ["v1", "v2"]) == 1.0
    assert average_compatibility(values, ["v1"]) is None


# Config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("far", "name"),
    [(1e-3, "tar@1e-3"), (0.1, "tar@1e-1"), (1e-4, "tar@1e-4"), (2.5e-4, "tar@2.5e-4"), (0.05, "tar@5e-2")],
)
def test_names_of_tar(far: float, name: str) -> None:
    assert tar_name(far) == name
    assert tar_name(np.float64(far)) == name


def test_other_names() -> None:
    assert (tpir_name(0.01), rate_name("far", 2.5e-4)) == ("tpir@1e-2", "far@2.5e-4")


def test_config_defaults() -> None:
    assert EvaluationConfig().metric_names == ("rank1", "tar@1e-3")
    assert EvaluationConfig().judged == ("rank1", "tar@1e-3")


def test_metrics_stand_in_the_order_of_reports() -> None:
    config = EvaluationConfig(ranks=(1, 5), far=(1e-3,), fpir=(1e-2, 1e-1), mean_average_precision=True)
    assert config.metric_names == ("rank1", "rank5", "map", "tpir@1e-2", "tpir@1e-1", "tar@1e-3")
    assert EvaluationConfig(criterion_on=("rank1",)).judged == ("rank1",)
    only = EvaluationConfig(ranks=(), far=(), mean_average_precision=True)
    assert only.metric_names == ("map",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"far": (), "ranks": ()}, "ask for at least one metric"),
        ({"far": (1e-3, 0.001)}, "asked for twice"),
        ({"fpir": (0.01, 1e-2)}, "asked for twice"),
        ({"fpir": (1.5,)}, "less than 1"),
        ({"bootstrap": -1}, "greater than or equal to 0"),
        ({"ranks": (1, 1)}, "asked for twice"),
        ({"criterion_on": ("rank5",)}, "'rank5', which is not evaluated"),
        ({"far": (0.0,)}, "greater than 0"),
        ({"far": (1.0,)}, "less than 1"),
        ({"ranks": (0,)}, "greater than or equal to 1"),
        ({"rank": (1,)}, "Extra inputs"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig(**fields)
