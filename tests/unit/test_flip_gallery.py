"""The error gallery: which flips it shows, and that it shows the right images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data.finishing import write_data_set
from pipeline.data.sources import Sample
from pipeline.errors import DataError
from pipeline.evaluation import flip_gallery, plots
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.flip_gallery import Flip, plot_flips, read_pictures, worst_flips
from pipeline.evaluation.measurement import measure
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.identities import IdentityTable
from tests.pictures import encode, noise

CONFIG = EvaluationConfig(far=(), bootstrap=0)


def models() -> tuple[Embeddings, Embeddings]:
    """Four identities; images 0 to 3 are enrolled, 4 to 7 the queries in the same order.

    The old model is right throughout. The new model's query 5 is nearer to item 2, its query 7 far nearer to item 0.
    """
    fields: dict[str, Any] = {
        "identity_N": np.tile(np.arange(4), 2),
        "group_N": np.repeat([0, 1], 4),
        "is_gallery_N": np.repeat([True, False], 4),
    }
    right = np.eye(4, dtype=np.float32)
    now = right.copy()
    now[1] = [0, 0.6, 0.8, 0]
    now[3] = [1, 0, 0, 0]
    old = Embeddings(np.vstack([right, right]), generation="v1", **fields)
    return Embeddings(np.vstack([right, now]), generation="v2", **fields), old


def test_the_surest_errors_come_first() -> None:
    new, old = models()
    measured = measure({"v1": old, "v2": new}, [("v1", "v1"), ("v2", "v1")], CONFIG)
    before, after = measured["v1/v1"].outcomes, measured["v2/v1"].outcomes
    assert before is not None
    assert after is not None
    first, second = worst_flips(new, old, before, after, measured.images)
    assert first == Flip(query=7, right=3, right_score=1.0, wrong=0, wrong_score=1.0, mate_score=0.0)
    assert (second.query, second.right, second.wrong) == (5, 1, 2)
    assert (second.wrong_score, second.mate_score) == pytest.approx((0.8, 0.6))
    assert worst_flips(old, old, before, before, measured.images) == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    samples = [Sample(f"s{n}", encode(noise(n)), "png", f"id-{n % 4}", {}) for n in range(8)]
    write_data_set(folder, "noise", IdentityTable(tuple(f"id-{n}" for n in range(4))), [samples[:3], samples[3:]])
    return folder


def test_pictures_are_those_of_their_numbers(shards: Path) -> None:
    for number, pixels in zip((7, 0, 3, 2), read_pictures(shards, (7, 0, 3, 2)), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(noise(number)))
    (tar, *_) = sorted(shards.glob("*.tar"))
    kept = tar.read_bytes()
    tar.write_bytes(kept[:100])
    try:
        with pytest.raises(DataError, match="image 0 cannot be read"):
            read_pictures(shards, (0,))
    finally:
        tar.write_bytes(kept)


def test_a_row_a_flip(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        plots.save_figure(figure, path)

    monkeypatch.setattr(flip_gallery, "save_figure", keep)
    flips = [Flip(7, 3, 0.9, 0, 0.8, 0.1), Flip(5, 1, 0.7, 2, 0.6, 0.5)]
    keys = [f"a-very-long-key-of-image-{n}" for n in range(8)]
    plot_flips(flips, shards, keys, "v2 instead of v1", tmp_path / "flips.png")
    with Image.open(tmp_path / "flips.png") as image:
        assert min(image.size) > 400
    axes = figures[0].axes
    shown = [np.asarray(one.images[0].get_array()) for one in axes if one.images]
    for pixels, number in zip(shown, (7, 3, 0, 5, 1, 2), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(noise(number)))
    words = ["".join(text.get_text() for text in one.texts) for one in axes if one.texts]
    assert "cosine 0.900" in words[1]
    assert "cosine 0.800" in words[2]
    assert "right one 0.100" in words[2]
    assert words[0].replace("\n", "").startswith("a-very-long-key-of-image-7")
    with pytest.raises(DataError, match="no negative flip"):
        plot_flips([], shards, keys, "none", tmp_path / "none.png")
