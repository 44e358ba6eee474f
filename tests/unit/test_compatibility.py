"""Cross-tests between generations, the criterion, the update gain and the report."""

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from pipeline.errors import ConfigError, DataError, GenerationError
from pipeline.evaluation.compatibility import (
    Embeddings,
    EvaluationConfig,
    Report,
    build_report,
    compared_scores,
    criterion,
    cross_test,
    render_table,
    tar_name,
    update_gain,
)

IDENTITIES, GROUPS = 12, 5
IDENTITY = np.repeat(np.arange(IDENTITIES), GROUPS)
GROUP = np.tile(np.arange(GROUPS), IDENTITIES)
FAR = EvaluationConfig(far=(0.1, 0.01), ranks=(1, 3))


def embed(generation: str, noise: float, dim: int = 6, seed: int = 0, **fields: Any) -> Embeddings:
    """Noisy copies of the identities' true directions: generations share them, so they are compatible."""
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(99).standard_normal((IDENTITIES, 16))[IDENTITY]
    vectors = (centre + noise * random.standard_normal(centre.shape))[:, :dim].astype(np.float32)
    values: dict[str, Any] = {
        "vectors_ND": vectors,
        "identity_N": IDENTITY,
        "group_N": GROUP,
        "is_gallery_N": GROUP == 2,
        "generation": generation,
    }
    return Embeddings(**(values | fields))


def by_hand(query: Embeddings, gallery: Embeddings, far: float, k: int) -> dict[str, float]:
    """The protocol of the quickstart, one pair at a time, in float64."""
    dim = gallery.vectors_ND.shape[1]
    q = query.vectors_ND[:, :dim].astype(float)
    g = gallery.vectors_ND.astype(float)
    score = [[float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)) for b in g] for a in q]
    count = len(q)
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
def test_cross_test_matches_the_protocol_by_hand(dims: tuple[int, int]) -> None:
    new, old = embed("v2", 0.5, dims[0], seed=1), embed("v1", 1.0, dims[1], seed=2)
    found = cross_test(new, old, FAR)
    assert list(found) == ["rank1", "rank3", "tar@1e-1", "tar@1e-2"] == list(FAR.metric_names)
    for far, k in ((0.1, 1), (0.01, 3)):
        for name, value in by_hand(new, old, far, k).items():
            assert found[name] == pytest.approx(value, abs=1e-12)
            assert 0 < value < 1  # the case could have gone otherwise


def test_query_and_gallery_are_not_interchangeable() -> None:
    new, old = embed("v2", 0.3, seed=1), embed("v1", 1.2, seed=2)
    assert cross_test(new, old, FAR) != cross_test(old, new, FAR)
    assert cross_test(new, old, FAR)["rank1"] > cross_test(old, old, FAR)["rank1"]


def test_a_larger_query_is_cut_to_the_gallery_and_renormalised() -> None:
    old = embed("v1", 0.8, 6, seed=2)
    small = embed("v2", 0.5, 6, seed=1)
    # What follows the old dimensions, however large, must not matter to the old gallery.
    rest = 100 * np.random.default_rng(0).standard_normal((len(IDENTITY), 5)).astype(np.float32)
    wide = embed("v2", 0.5, vectors_ND=np.hstack([small.vectors_ND, rest]))
    assert cross_test(wide, old, FAR) == cross_test(small, old, FAR)
    assert cross_test(wide, wide, FAR) != cross_test(small, small, FAR)


def test_a_smaller_query_is_an_error() -> None:
    with pytest.raises(GenerationError, match="queries of v2 have 4 dimensions, the gallery of v1 has 6"):
        cross_test(embed("v2", 0.5, 4), embed("v1", 0.5, 6), FAR)


def test_other_images_or_another_order_trip_an_assertion() -> None:
    first = embed("v1", 0.5)
    for field, value in (("identity_N", IDENTITY[::-1].copy()), ("group_N", GROUP + 1), ("is_gallery_N", GROUP == 1)):
        with pytest.raises(AssertionError, match=f"same images in the same order .{field}"):
            cross_test(embed("v2", 0.5, **dict[str, Any]({field: value})), first, FAR)


def test_rank_needs_both_roles() -> None:
    everyone: dict[str, Any] = {"is_gallery_N": np.ones(len(IDENTITY), np.bool_)}
    enrolled = embed("v1", 0.5, **everyone)
    with pytest.raises(DataError, match="60 enrolled images and 0 queries"):
        cross_test(enrolled, enrolled, FAR)
    assert list(cross_test(enrolled, enrolled, EvaluationConfig(ranks=(), far=(0.1,)))) == ["tar@1e-1"]


def test_a_far_below_the_test_set_is_an_error() -> None:
    one = embed("v1", 0.5)
    # 60 * 60 ordered pairs, less those of one typeface, less genuine ones: 12 * 11 * 5 * 4 impostors.
    assert compared_scores(one, one).impostors == 2640
    with pytest.raises(DataError, match=r"FAR 0\.0001 needs at least 10000 impostor pairs, .* gives 2640"):
        cross_test(one, one, EvaluationConfig(far=(1e-4,)))


def test_the_tail_grows_with_the_far(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = embed("v2", 0.5, seed=1), embed("v1", 1.0, seed=2)
    config = EvaluationConfig(far=(0.5, 0.01))
    expected = cross_test(new, old, config)
    monkeypatch.setattr("pipeline.evaluation.metrics.TAIL", 3)
    assert cross_test(new, old, config) == expected


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


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_gain_is_positive_and_one_at_the_paragon(cross: float, old: float, paragon: float) -> None:
    gain = update_gain(cross, old, paragon)
    assert (gain is not None) == (criterion({"m": cross}, {"m": old}) and paragon > old)
    assert gain is None or gain > 0
    assert paragon <= old or update_gain(paragon, old, paragon) == 1


# Report ---------------------------------------------------------------------------------------------------------

PAIRS = {
    "v2-paragon/v2-paragon": {"rank1": 0.382, "tar@1e-3": 0.259},
    "v2/v2": {"rank1": 0.381, "tar@1e-3": 0.242},
    "v1/v1": {"rank1": 0.270, "tar@1e-3": 0.185},
    "v2-paragon/v1": {"rank1": 0.001, "tar@1e-3": 0.002},
    "v2/v1": {"rank1": 0.291, "tar@1e-3": 0.187},
}


def text_of(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render_table(report))
    return stream.getvalue()


def test_report_of_the_sketched_upgrade() -> None:
    report = build_report(PAIRS, "v1", "v2", "v2-paragon")
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["generations"] == ["v1", "v2", "paragon"]
    assert found["metrics"]["rank1"] == {
        "v1/v1": 0.270,
        "v2/v1": 0.291,
        "v2/v2": 0.381,
        "paragon/v1": 0.001,
        "paragon/paragon": 0.382,
    }
    assert list(found["metrics"]["tar@1e-3"]) == ["v1/v1", "v2/v1", "v2/v2", "paragon/v1", "paragon/paragon"]
    assert found["criterion"] == {"v2/v1": True}
    assert found["update_gain"] == {"rank1": pytest.approx(0.1875), "tar@1e-3": pytest.approx(2 / 74)}
    assert report.compatible


def test_one_failing_metric_fails_the_criterion_and_has_no_gain() -> None:
    pairs = PAIRS | {"v2/v1": {"rank1": 0.291, "tar@1e-3": 0.185}}
    report = build_report(pairs, "v1", "v2", "v2-paragon")
    assert report.criterion == {"v2/v1": False}
    assert report.update_gain == {"rank1": pytest.approx(0.1875), "tar@1e-3": None}
    on_rank = build_report(pairs, "v1", "v2", "v2-paragon", criterion_on=("rank1",))
    assert on_rank.compatible
    assert on_rank.criterion_on == ("rank1",)


def test_report_without_a_paragon_has_no_gain() -> None:
    pairs = {label: values for label, values in PAIRS.items() if "paragon" not in label}
    report = build_report(pairs, "v1", "v2")
    assert report.update_gain == {}
    assert "update gain" not in text_of(report)


def test_report_needs_its_pairs() -> None:
    for label, shown in (("v1/v1", "v1/v1"), ("v2/v1", "v2/v1"), ("v2-paragon/v2-paragon", "paragon/paragon")):
        pairs = {other: values for other, values in PAIRS.items() if other != label}
        with pytest.raises(DataError, match=f"pair {shown} was not measured"):
            build_report(pairs, "v1", "v2", "v2-paragon")
    with pytest.raises(ConfigError, match="'rank5', which was not measured; choose of rank1, tar@1e-3"):
        build_report(PAIRS, "v1", "v2", criterion_on=("rank5",))


def test_table_shows_pairs_verdict_and_gain_in_80_columns() -> None:
    text = text_of(build_report(PAIRS, "v1", "v2", "v2-paragon"))
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(rows) == [
        "v1/v1",
        "v2/v1",
        "v2/v2",
        "paragon/v1",
        "paragon/paragon",
        "criterion",
        "update gain",
    ]
    assert "0.2910" in rows["v2/v1"]
    assert "met +0.0210" in rows["criterion"]
    assert re.search(r"18\.[78]%", rows["update gain"])  # 0.1875 lies between
    assert "2.7%" in rows["update gain"]
    assert "v2 is compatible with v1" in text
    failing = text_of(build_report(PAIRS | {"v2/v1": {"rank1": 0.2, "tar@1e-3": 0.187}}, "v1", "v2", "v2-paragon"))
    assert "v2 is NOT compatible with v1" in failing
    assert "no -0.0700" in failing
    assert "none" in failing


# Config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("far", "name"),
    [(1e-3, "tar@1e-3"), (0.1, "tar@1e-1"), (1e-4, "tar@1e-4"), (2.5e-4, "tar@2.5e-4"), (0.05, "tar@5e-2")],
)
def test_names_of_tar(far: float, name: str) -> None:
    assert tar_name(far) == name
    assert tar_name(np.float64(far)) == name


def test_config_defaults() -> None:
    assert EvaluationConfig().metric_names == ("rank1", "tar@1e-3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"far": (), "ranks": ()}, "name at least one metric"),
        ({"far": (1e-3, 0.001)}, "asked for twice"),
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
