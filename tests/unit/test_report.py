"""The report on matrices made by hand, and its two renderings."""

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.evaluation.bootstrap import Estimate, Resampling
from pipeline.evaluation.figures import Images, Threshold
from pipeline.evaluation.identification import SearchOutcomes
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import Measured, Measurements, measure
from pipeline.evaluation.rendering import markdown, percent, render, verdicts
from pipeline.evaluation.report import SECTIONS, build_report
from pipeline.evaluation.settings import EvaluationConfig
from tests.unit.embeddings import embed

LINEAGE = Lineage(("v1", "v2", "v2-paragon"), {"v2": ("v1",), "v1": ("v0",)}, {"v2": "v2-paragon"})
CONFIG = EvaluationConfig(bootstrap=3)
NOTHING = np.empty(0)
# rank-1 and TAR@1e-3; the sketch of the small quickstart profile.
MATRIX = {
    "v1/v1": (0.270, 0.185),
    "v2/v1": (0.291, 0.187),
    "v2/v2": (0.381, 0.242),
    "v2-paragon/v1": (0.001, 0.002),
    "v2-paragon/v2": (0.003, 0.001),
    "v2-paragon/v2-paragon": (0.382, 0.259),
}
RIGHT = {"v1": [1, 1, 0, 0, 1], "v2": [1, 0, 1, 0, 1], "v2-paragon": [0, 0, 0, 0, 0]}
IDENTITY = np.array([0, 0, 1, 2, 2])


def outcomes(right: list[int]) -> SearchOutcomes:
    """Five queries, the last without a mate."""
    mated = np.array([1, 1, 1, 1, 0], bool)
    score = np.full(5, 0.5, np.float32)
    return SearchOutcomes(IDENTITY, mated, score, score, 1 - np.array(right), np.full(5, np.nan))


def by_hand(matrix: dict[str, tuple[float, float]], spread: float = 0.0) -> Measurements:
    """Measured pairs whose replicates lie `spread` below, at and above the value."""
    weight = np.array([[1, 3, 0], [1, 0, 3], [1, 0, 0]], np.uint16)
    images = Images(IDENTITY, NOTHING.astype(bool), NOTHING.astype(bool), Resampling(weight), NOTHING.astype(np.int64))
    pairs = {}
    for label, values in matrix.items():
        query, gallery = label.split("/")
        metrics = {
            name: Estimate(value, value + spread * np.array([-1.0, 0.0, 1.0]) * (query != gallery))
            for name, value in zip(CONFIG.metric_names, values, strict=True)
        }
        at = {"far@1e-3": Threshold(0.4 if gallery == "v1" else 0.5, np.full(3, 0.4, np.float32))}
        far = {} if query == gallery else {"far@1e-3": Estimate(0.002, np.array([0.001, 0.002, 0.003]))}
        right = RIGHT[gallery if query == gallery else query]
        pairs[label] = Measured(query, gallery, metrics, outcomes(right), at, far, None)
    return Measurements(pairs, images)


def report_of(matrix: dict[str, tuple[float, float]] = MATRIX, spread: float = 0.0, **config: Any) -> dict[str, Any]:
    made = build_report(by_hand(matrix, spread), LINEAGE, CONFIG.model_copy(update=config))
    report: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert set(SECTIONS) < report.keys()
    return report


def test_report_of_the_sketched_upgrade() -> None:
    report = report_of(spread=0.01)
    assert report["generations"] == ["v1", "v2", "v2-paragon"]
    assert report["paragons"] == {"v2": "v2-paragon"}
    assert report["criterion_on"] == ["rank1", "tar@1e-3"]
    assert list(report["matrix"]["rank1"]) == list(MATRIX)
    assert report["matrix"]["rank1"]["v2/v1"] == pytest.approx({"value": 0.291, "low": 0.281, "high": 0.301})
    judged = report["criterion"]["v2/v1"]
    assert (judged["held"], judged["certain"], judged["ancestor"]) == (True, False, True)
    assert judged["differences"]["rank1"] == pytest.approx({"value": 0.021, "low": 0.011, "high": 0.031})
    assert judged["differences"]["tar@1e-3"] == pytest.approx({"value": 0.002, "low": -0.008, "high": 0.012})
    gains = report["update_gain"]["v2/v1"]
    assert gains["rank1"] == pytest.approx({"value": 21 / 112, "low": 11 / 112, "high": 31 / 112})
    assert gains["tar@1e-3"]["value"] == pytest.approx(2 / 74)
    assert report["average_compatibility"]["rank1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["average_compatibility"]["tar@1e-3"] == {"value": 1.0, "low": 0.0, "high": 1.0}
    assert report["backfill"] == {}  # no embeddings were given


def test_certain_needs_every_interval_above_nought() -> None:
    assert report_of(spread=0.001)["criterion"]["v2/v1"]["certain"]
    assert not report_of(spread=0.002)["criterion"]["v2/v1"]["certain"]
    assert report_of(spread=0.01, criterion_on=("rank1",))["criterion"]["v2/v1"]["certain"]


def test_a_paragon_on_an_old_gallery_fails_and_is_of_no_lineage() -> None:
    report = report_of()
    for pair in ("v2-paragon/v1", "v2-paragon/v2"):
        judged = report["criterion"][pair]
        assert (judged["held"], judged["certain"], judged["ancestor"]) == (False, False, False)
        assert report["update_gain"][pair] == {"rank1": None, "tar@1e-3": None}
    assert report["criterion"]["v2-paragon/v1"]["differences"]["rank1"]["value"] == pytest.approx(-0.269)


def test_the_criterion_is_strict_and_a_failing_metric_has_no_gain() -> None:
    report = report_of(MATRIX | {"v2/v1": (0.291, 0.185)})
    assert not report["criterion"]["v2/v1"]["held"]
    assert report["update_gain"]["v2/v1"]["tar@1e-3"] is None
    assert report["update_gain"]["v2/v1"]["rank1"]["value"] == pytest.approx(0.1875)
    assert report_of(MATRIX | {"v2/v1": (0.291, 0.185)}, criterion_on=("rank1",))["criterion"]["v2/v1"]["held"]


def test_flips_by_hand() -> None:
    # Of four mated queries v2 loses the second and wins the third. The draws are (1, 1, 1), (3, 0, 0) and (0, 3, 0).
    flips = report_of()["negative_flips"]
    assert flips["v2/v1"]["negative"] == {"value": 0.25, "low": 0.0, "high": 0.5}
    assert flips["v2/v1"]["positive"] == {"value": 0.25, "low": 0.0, "high": 1.0}
    assert flips["v2-paragon/v1"]["negative"]["value"] == 0.5


def test_thresholds_are_told() -> None:
    assert report_of()["threshold"]["v2/v1"] == {
        "far@1e-3": {
            "old_threshold": 0.4,
            "far_at_old_threshold": {"value": 0.002, "low": 0.001, "high": 0.003},
            "restoring_threshold": 0.4,
        }
    }


def test_lineage() -> None:
    line = Lineage(("a", "b", "c", "b-p"), {"b": ("a",), "c": ("b", "elsewhere")}, {"b": "b-p"})
    assert line.ancestors("c") == {"a", "b"}
    assert line.ancestors("b-p") == set()
    assert list(line.upgrades()) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert line.served() == ["a", "b", "c"]
    pairs = line.pairs({"a": 8, "b": 16, "c": 8, "b-p": 16})
    assert pairs == [
        ("a", "a"),
        ("b", "a"),
        ("b", "b"),
        ("c", "a"),  # not c on b: it has fewer dimensions
        ("c", "c"),
        ("b-p", "a"),
        ("b-p", "b"),
        ("b-p", "c"),
        ("b-p", "b-p"),
    ]


def test_a_line_of_four_generations_from_embeddings() -> None:
    embedded = {f"v{n}": embed(f"v{n}", 1.2 - 0.25 * n, seed=n) for n in range(1, 5)}
    line = Lineage(tuple(embedded), {"v2": ("v1",), "v3": ("v2",), "v4": ("v3",)}, {})
    config = EvaluationConfig(far=(0.05,), fpir=(0.1,), bootstrap=20)
    measured = measure(embedded, line.pairs(dict.fromkeys(embedded, 6)), config)
    report = json.loads(json.dumps(build_report(measured, line, config, embedded), allow_nan=False))
    assert len(report["matrix"]["rank1"]) == 10
    assert len(report["criterion"]) == len(report["backfill"]) == 6
    assert all(judged["ancestor"] for judged in report["criterion"].values())
    assert all(gains == dict.fromkeys(config.metric_names) for gains in report["update_gain"].values())
    matrix = report["matrix"]["rank1"]
    held = [matrix[pair]["value"] > matrix[f"{pair[-2:]}/{pair[-2:]}"]["value"] for pair in report["criterion"]]
    assert report["average_compatibility"]["rank1"]["value"] == pytest.approx(sum(held) / 6)
    assert "v4/v1" in markdown(report, "line")
    assert "tpir@1e-1" in text_of(report)


# Renderings -----------------------------------------------------------------------------------------------------


def text_of(report: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(render(report))
    return stream.getvalue()


def test_percent() -> None:
    assert percent({"value": 0.3123, "low": 0.3011, "high": 0.324}) == "31.2 [30.1, 32.4]"
    assert percent({"value": 0.012, "low": -0.001, "high": 0.024}, signed=True) == "+1.2 [-0.1, +2.4]"
    assert percent({"value": 0.5, "low": None, "high": None}) == "50.0"
    assert percent({"value": 0.5, "low": 0.1, "high": None}) == "50.0 [10.0, no end]"
    assert percent(None) == percent({"value": None, "low": None, "high": None}) == "none"


def test_terminal_has_a_row_a_metric_in_80_columns() -> None:
    text = text_of(report_of(spread=0.001))
    assert "v2 is compatible with v1" in text
    rows = {
        line.split()[0]: " ".join(line.split()[1:])
        for line in text.splitlines()
        if line.startswith("  ") and line.strip()
    }
    assert rows["rank1"] == "27.0 29.1 38.1 +2.1 [+2.0, +2.2] 18.7 [17.9, 19.6]"
    assert rows["tar@1e-3"] == "18.5 18.7 24.2 +0.2 [+0.1, +0.3] 2.7 [1.4, 4.1]"
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_one_line_an_upgrade() -> None:
    (line,) = verdicts(report_of(spread=0.001))
    assert line == "v2 is compatible with v1: rank1 +2.1 [+2.0, +2.2], tar@1e-3 +0.2 [+0.1, +0.3]"
    assert "v2 is compatible (not beyond chance) with v1: " in verdicts(report_of(spread=0.01))[0]
    assert "v2 is NOT compatible with v1: " in verdicts(report_of(MATRIX | {"v2/v1": (0.2, 0.187)}))[0]


def test_markdown_holds_every_table() -> None:
    text = markdown(report_of(spread=0.001), "quick")
    assert "| v2/v1 | 29.1 [29.0, 29.2] | 18.7 [18.6, 18.8] |" in text
    assert "| v2/v1 | yes | compatible | +2.1 [+2.0, +2.2] | +0.2 [+0.1, +0.3] |" in text
    assert "| v2/v1 | 18.7 [17.9, 19.6] | 2.7 [1.4, 4.1] |" in text
    assert "| v2/v1 | 25.0 [0.0, 50.0] | 25.0 [0.0, 100.0] |" in text
    assert "| v2/v1 | far@1e-3 | 0.4000 | 2.00e-03 [1.00e-03, 3.00e-03] | 0.4000 |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert all(width > 2 for width in widths)


def test_one_generation_has_a_table_and_no_verdict() -> None:
    line = Lineage(("v1",), {}, {})
    report = build_report(by_hand({"v1/v1": (0.27, 0.185)}), line, CONFIG)
    assert verdicts(report) == []
    assert "27.0 [27.0, 27.0]" in text_of(report)
    assert "## Criterion" not in markdown(report, "one")
    assert report["average_compatibility"]["rank1"]["value"] is None
