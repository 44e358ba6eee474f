"""Model cards of records and reports made by hand."""

import re
from typing import Any

import pytest

from pipeline.data.preprocess import PreprocessConfig
from pipeline.generation_record import GenerationRecord
from pipeline.model.backbones import BackboneConfig
from pipeline.model.margins import MarginConfig
from pipeline.tracking.model_card import MOST, model_card
from pipeline.tracking.pages import MAX_DESCRIPTION, shortened
from tests.unit.test_report import MATRIX, report_of


def record_of(**other: Any) -> GenerationRecord:
    fields: dict[str, Any] = {
        "family": "glyphs",
        "name": "v2",
        "parents": {"v1": "a" * 64},
        "backbone": BackboneConfig(name="small"),
        "preprocess": PreprocessConfig(),
        "margin": MarginConfig(name="cosface", m3=0.2),
        "identities": 3000,
        "config": {},
        "config_digest": "c" * 64,
        "data_digest": "d" * 64,
        "code_version": "0.1.0 (abc)",
        "training": {"steps": 1400.0},
    }
    return GenerationRecord(**(fields | other))


def test_card_of_an_evaluated_generation() -> None:
    card = model_card(record_of(), report_of(spread=0.01), "models:/m-1")
    assert card.startswith("v2 of glyphs. Embeds grey")
    assert "Embeds grey images of 32 x 32 pixels as vectors of 128 values" in card
    assert "trained for 1,400 steps" in card
    assert "- **v1**: **compatible.** Queries of v2 may search v1's gallery as it is." in card
    assert "within chance" in card  # tar@1e-3: +0.2 [-0.8, +1.2]
    assert "Points over v1 alone: rank1 +2.1 [+1.1, +3.1], tar@1e-3 +0.2 [-0.8, +1.2]." in card
    assert "Self-test, with its 95 % interval: rank1 38.1 [38.1, 38.1] %, tar@1e-3" in card
    assert re.search(r"Update gain on v1's gallery, of what v2-paragon gains .* backfill: rank1 18\.[78] \[", card)
    assert 'mlflow.pyfunc.load_model("models:/m-1")' in card
    assert "jobs/promote.py --config FILE --generation v2" in card
    assert "--rollback" in card
    assert "- parents: v1 (`aaaaaaaaaaaa`)" in card
    assert "manifest `dddddddddddd`" in card
    assert card == shortened(card)


def test_what_failed_is_said() -> None:
    card = model_card(record_of(), report_of(MATRIX | {"v2/v1": (0.2, 0.1)}), "models:/m-1")
    assert "- **v1**: **not compatible.** Queries of v2 must not search v1's gallery: embed it again first." in card
    assert "may search v1's" not in card
    assert "Update gain" not in card


@pytest.mark.parametrize("report", [None, report_of()])
def test_what_was_not_evaluated_claims_nothing(report: dict[str, Any] | None) -> None:
    card = model_card(record_of(name="v3", parents={"v2": "b" * 64}), report, "models:/m-1")
    assert "- **v2**: not judged yet." in card
    assert "compatible" not in card.split("## How to use it")[0]
    assert "How good" not in card
    assert "without a parent" in model_card(record_of(parents={}), None, "models:/m-1")


def test_card_of_an_imported_generation_promises_no_embedding() -> None:
    imported = record_of(name="v0", parents={}, backbone=None, preprocess=None, dim=256, training={})
    card = model_card(imported, None, "models:/m-1")
    assert "embeddings only, 256 dimensions" in card
    assert "load_model" not in card


def test_a_long_line_of_ancestors_fits_a_description() -> None:
    names = [f"v{number}" for number in range(1, 31)]
    report = report_of()
    judged = report["criterion"]["v2/v1"]
    report["criterion"] = {f"v31/{name}": judged for name in names}
    report["generations"], report["paragons"] = [*names, "v31"], {"v31": "v31-paragon"}
    report["update_gain"] = dict.fromkeys(report["criterion"], report["update_gain"]["v2/v1"])
    report["matrix"] = {metric: {"v31/v31": row["v2/v2"]} for metric, row in report["matrix"].items()}
    card = model_card(record_of(name="v31", parents={"v30": "a" * 64}), report, "models:/m-1")
    assert len(re.findall(r"^- \*\*v\d+\*\*", card, re.MULTILINE)) == MOST
    assert "**v30**" in card
    assert "- 20 older generations" in card
    assert len(shortened(card)) <= MAX_DESCRIPTION
    assert "How to use it" in shortened(card)
