"""The picture of the lineage shows whom it is given, and what was found."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from pipeline.tracking import lineage_picture
from pipeline.tracking.lineage_picture import CROSS, FAILED, HELD, MOST, TICK, UNJUDGED, Edge, plot_lineage
from tests.unit.drawings import keep_figures

CHAIN = {f"v{n}": (f"v{n - 1}",) if n > 1 else () for n in range(1, 8)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return keep_figures(monkeypatch, lineage_picture)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def arrows(figure: Figure) -> list[FancyArrowPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]


def test_one_generation(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_lineage("v1", {"v1": (), "other": ()}, {}, tmp_path / "new" / "lineage.png")
    assert texts(drawn[0]) == ["v1"]
    assert arrows(drawn[0]) == []
    assert drawn[0].legends == []
    with Image.open(tmp_path / "new" / "lineage.png") as image:
        assert image.format == "PNG"


def test_verdicts_differ_by_sign_and_colour_and_parents_are_solid(tmp_path: Path, drawn: list[Figure]) -> None:
    edges = {("v2", "v1"): Edge(True, "+1.9"), ("v3", "v1"): Edge(False, "-0.3")}
    plot_lineage("v3", {"v1": (), "v2": ("v1",), "v3": ("v2",)}, edges, tmp_path / "lineage.png")
    assert set(texts(drawn[0])) == {"v1", "v2", "v3", f"{TICK} +1.9", f"{CROSS} -0.3", "?"}
    shades = {text.get_text(): text.get_color() for text in drawn[0].axes[0].texts}
    assert (shades[f"{TICK} +1.9"], shades[f"{CROSS} -0.3"], shades["?"]) == (HELD, FAILED, UNJUDGED)
    solid = [arrow.get_linestyle() == "-" for arrow in arrows(drawn[0])]
    assert sorted(solid) == [False, True, True]  # v3 to v1 is no parent
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [f"{TICK} yes", f"{CROSS} no", "? not judged", "parent", "older"]


def test_seven_generations_show_every_pair(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_lineage("v7", CHAIN, {}, tmp_path / "lineage.png")
    assert len(arrows(drawn[0])) == 21
    assert drawn[0].axes[0].get_title() == "Lineage of v7"


def test_only_relatives_are_shown_and_not_too_many(tmp_path: Path, drawn: list[Figure]) -> None:
    chain = {f"v{n}": (f"v{n - 1}",) if n > 1 else () for n in range(1, 13)} | {"stranger": ("v1",)}
    plot_lineage("v12", chain, {}, tmp_path / "new.png")
    plot_lineage("v1", chain, {}, tmp_path / "old.png")
    plot_lineage("stranger", chain, {}, tmp_path / "stranger.png")
    shown = [[text for text in texts(figure) if text != "?"] for figure in drawn]
    assert shown[0] == [f"v{n}" for n in range(13 - MOST, 13)]
    assert shown[1] == [f"v{n}" for n in range(1, MOST + 1)]
    assert shown[2] == ["v1", "stranger"]
    assert drawn[0].axes[0].get_title() == f"Lineage of v12 ({12 - MOST} more not shown)"
