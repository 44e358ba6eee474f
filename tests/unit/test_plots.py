"""The pictures: written whole, readable back, and showing what they were given."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.errors import DataError
from pipeline.evaluation import plots
from pipeline.evaluation.plots import BackfillCurve, plot_backfill, plot_det, plot_matrix
from tests.unit.drawings import keep_figures

FAR = np.geomspace(1e-6, 1, 50)
MATRIX = np.array([[0.27, np.nan, np.nan], [0.291, 0.381, np.nan], [0.002, np.nan, 0.382]])
NAMES = ("v1", "v2", "paragon")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return keep_figures(monkeypatch, plots)


def pixels(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_det_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "new" / "det.png"
    frr = 1 - FAR**0.2
    plot_det({"v1/v1": (FAR, frr), "v2/v1": (FAR, 0.7 * frr)}, path)
    width, height = pixels(path)
    assert width > 900
    assert height > 600
    assert [item.name for item in path.parent.iterdir()] == ["det.png"]  # nothing half-written is left
    axes = drawn[0].axes[0]
    assert "false accept rate" in axes.get_xlabel()
    assert "false reject rate" in axes.get_ylabel()
    assert axes.get_title()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["v1/v1", "v2/v1"]
    # The last point, FAR 1 and FRR 0, has no place on logarithmic axes.
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), FAR[:-1])
    np.testing.assert_allclose(np.asarray(axes.lines[1].get_ydata()), 0.7 * frr[:-1])


def test_many_curves_differ_by_more_than_colour(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_det({f"v{i}/v1": (FAR, (1 - FAR**0.2) / (1 + i)) for i in range(9)}, tmp_path / "det.png")
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(looks) == 9


def test_det_bands_lie_around_their_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    frr = 1 - FAR**0.2
    plot_det({"v1/v1": (FAR, frr), "v2/v1": (FAR, frr / 2)}, tmp_path / "det.png", {"v2/v1": (FAR, frr / 4, frr)})
    axes = drawn[0].axes[0]
    assert "95 %" in axes.get_title()
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert np.asarray(corners)[:, 1].max() == pytest.approx(frr.max())
    assert band.get_facecolor()[0][:3] == pytest.approx([0xD5 / 255, 0x5E / 255, 0])  # type: ignore[index]


def test_backfill_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    share = [0.0, 0.5, 1.0]
    plot_backfill({"v2/v1": BackfillCurve(share, [0.3, 0.4, 0.6], [0.3, 0.5, 0.6], 0.2)}, "rank1", tmp_path / "b.png")
    plot_backfill({"v2/v1": BackfillCurve(share, [0.3, 0.4, 0.6], [0.3, 0.5, 0.6], None)}, "rank1", tmp_path / "c.png")
    assert min(pixels(tmp_path / "b.png")) > 600
    lines = {str(line.get_label()): list(np.asarray(line.get_ydata())) for line in drawn[0].axes[0].lines}
    assert lines == {
        "v2/v1, most ambiguous first": [0.3, 0.5, 0.6],
        "v2/v1, random order": [0.3, 0.4, 0.6],
        "v1/v1": [0.2, 0.2],
    }
    assert len(drawn[1].axes[0].lines) == 2
    with pytest.raises(DataError, match="no backfill curve"):
        plot_backfill({}, "rank1", tmp_path / "d.png")


def test_matrix_of_eight_generations_stays_legible(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [*(f"v{number}" for number in range(1, 8)), "v7-paragon"]
    values = np.where(np.tri(8, dtype=bool), 0.5, np.nan)
    plot_matrix(names, values, "rank1", tmp_path / "m.png")
    assert min(pixels(tmp_path / "m.png")) > 1200
    boxes = [label.get_window_extent() for label in drawn[0].axes[0].get_xticklabels()]
    assert all(left.x0 < right.x0 for left, right in pairwise(boxes))
    assert len(cell_texts(drawn[0])) == 64


def test_det_refuses_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no DET curve"):
        plot_det({}, tmp_path / "det.png")
    assert list(tmp_path.iterdir()) == []


def test_det_of_perfect_or_collapsed_models_is_still_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    corners = (np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    plot_det({"v1/v1": corners}, tmp_path / "one.png")
    plot_det({"v1/v1": corners, "v2/v1": (FAR, 1 - FAR**0.2)}, tmp_path / "two.png")
    for figure in drawn:
        legend = figure.axes[0].get_legend()
        assert legend is not None
        assert legend.get_texts()[0].get_text() == "v1/v1 (never both errors above 0)"
    assert len(np.asarray(drawn[1].axes[0].lines[1].get_xdata())) == 49


def cell_texts(figure: Figure) -> dict[tuple[int, int], str]:
    return {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in figure.axes[0].texts
    }


def test_matrix_marks_cells(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "matrix.png"
    plot_matrix(NAMES, MATRIX, "rank1", path, {"v2/v1": True, "paragon/v1": False})
    assert min(pixels(path)) > 400
    texts = cell_texts(drawn[0])
    assert len(texts) == 9
    assert texts[0, 0] == "0.270"
    assert texts[1, 0].split() == ["0.291", "criterion", "holds"]
    assert texts[2, 0].split() == ["0.002", "criterion", "fails"]
    assert texts[0, 1].split() == ["not", "measured"]
    axes = drawn[0].axes[0]
    assert "rank1" in axes.get_title()
    assert axes.get_xlabel().startswith("gallery")
    assert axes.get_ylabel().startswith("query")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(NAMES)
    frames = [(patch.get_y(), patch.get_linestyle()) for patch in axes.patches]  # type: ignore[attr-defined]
    assert len(frames) == 2
    assert {round(y + 0.45): style for y, style in frames} == {1: "-", 2: "--"}


def test_matrix_ink_contrasts_with_its_cell(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_matrix(("v1", "v2"), np.array([[0.0, 1.0], [0.3, 0.7]]), "rank1", tmp_path / "m.png")
    axes = drawn[0].axes[0]
    for text in axes.texts:
        x, y = text.get_position()
        value = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.3, (1, 1): 0.7}[round(y), round(x)]
        red, green, blue, _ = axes.images[0].cmap(value)
        paper = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert text.get_color() == ("black" if paper > 0.45 else "white")


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_matrix_of_one_generation(tmp_path: Path, value: float) -> None:
    plot_matrix(("v1",), np.array([[value]]), "tar@1e-3", tmp_path / "m.png")
    assert min(pixels(tmp_path / "m.png")) > 300


def test_matrix_refuses_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair of generations was measured on rank1"):
        plot_matrix(("v1",), np.array([[np.nan]]), "rank1", tmp_path / "m.png")
    with pytest.raises(AssertionError):
        plot_matrix(("v1",), MATRIX, "rank1", tmp_path / "m.png")


def test_an_older_picture_survives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_matrix(NAMES, MATRIX, "rank1", path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["m.png"]
