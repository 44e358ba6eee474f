"""The error gallery: queries that the old model got right and the new one gets wrong on the old gallery, as images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pipeline.data.catalogue import Catalogue
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from pipeline.evaluation.compatibility import Embeddings, comparable_gallery, comparable_query
from pipeline.evaluation.figures import Images
from pipeline.evaluation.identification import SearchOutcomes
from pipeline.evaluation.metrics import Float64, Int64, unit_rows
from pipeline.evaluation.plots import save_figure

WORST = 6  # rows of the picture
CELL_INCHES = 1.5

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Flip:
    """One negative flip; images by their number in the data set, scores as cosines.

    Attributes:
        query: the image that is searched for.
        right: the item that the old model finds first, of the query's identity.
        right_score: its score by the old model.
        wrong: the item that the new model's query finds first in the same gallery, of another identity.
        wrong_score: its score.
        mate_score: the score of the best item of the query's identity, by the new model's query.
    """

    query: int
    right: int
    right_score: float
    wrong: int
    wrong_score: float
    mate_score: float


def worst_flips(
    new: Embeddings, old: Embeddings, before: SearchOutcomes, after: SearchOutcomes, images: Images
) -> list[Flip]:
    """The negative flips in which the new model's query is surest of the wrong item, at most WORST.

    Args:
        new: the test images by the model that queries now.
        old: the same images by the model of the gallery, and of the queries before.
        before: what the old model's queries found, in the order of the images.
        after: what the new model's found.
        images: their labels.
    """
    queries = np.flatnonzero(~images.enrolled_N)
    flipped_Q = before.mated_Q & (before.ahead_Q == 0) & (after.ahead_Q > 0)
    lead_Q = np.where(flipped_Q, after.best_other_Q - after.best_mate_Q, -np.inf)
    worst = np.argsort(-lead_Q, kind="stable")[: min(WORST, np.count_nonzero(flipped_Q))]
    if not worst.size:
        return []
    rights, right_scores = _first_items(old, old, queries[worst], images, mates=True)
    wrongs, wrong_scores = _first_items(new, old, queries[worst], images, mates=False)
    return [
        Flip(int(queries[one]), int(right), float(right_score), int(wrong), float(wrong_score), float(mate))
        for one, right, right_score, wrong, wrong_score, mate in zip(
            worst, rights, right_scores, wrongs, wrong_scores, after.best_mate_Q[worst], strict=True
        )
    ]


def _first_items(
    query: Embeddings, gallery: Embeddings, queries: Int64, images: Images, mates: bool
) -> tuple[Int64, Float64]:
    """For each query its nearest enrolled image of its own identity, or of another: number and cosine."""
    items = np.flatnonzero(images.enrolled_N)
    unit_qD = unit_rows(comparable_query(query, gallery)[queries], "query")
    scores_qG = unit_qD @ unit_rows(comparable_gallery(query, gallery).vectors_ND[items], "gallery").T
    compared_qG = query.group_N[queries, None] != query.group_N[None, items]
    mate_qG = images.code_N[queries, None] == images.code_N[None, items]
    scores_qG[~compared_qG | (mate_qG != mates)] = -np.inf
    return items[scores_qG.argmax(axis=1)], scores_qG.max(axis=1)


def read_pictures(folder: Path, numbers: Sequence[int]) -> list[Pixels]:
    """Decode some images of a data set, (height, width, 3) each.

    Args:
        folder: of the shards.
        numbers: of the images, in the order of the shards.

    Raises:
        DataError: a shard cannot be read, or an image does not decode.
    """
    manifest = Manifest.load(folder)
    catalogue = Catalogue.load(folder, np.array([entry.samples for entry in manifest.shards]))
    pictures = []
    for number in numbers:
        shard = int(np.searchsorted(catalogue.starts, number, side="right")) - 1
        record, path = catalogue.records[number], folder / manifest.shards[shard].name
        try:
            with path.open("rb") as tar:
                tar.seek(int(record["offset"]))
                with Image.open(io.BytesIO(tar.read(int(record["size"])))) as image:
                    pictures.append(np.asarray(image.convert("RGB")))
        except OSError as error:  # Pillow's own are OSErrors too
            raise DataError(f"shard {path}: image {number} cannot be read: {error}; restore it or pack again") from None
    return pictures


def plot_flips(flips: Sequence[Flip], folder: Path, keys: Sequence[str], title: str, path: Path) -> None:
    """Draw negative flips, a row each: the query, the old model's match, the new model's; write them to `path` as PNG.

    Args:
        flips: what to draw.
        folder: of the shards of the images.
        keys: of all images of the data set.
        title: over the picture.
        path: the PNG; written beside and renamed, an older file is replaced.

    Raises:
        DataError: there is no flip, or an image cannot be read.
    """
    if not flips:
        raise DataError(f"no negative flip to draw in {path}: the new model loses none of the old one's matches")
    figure = Figure(figsize=(8.2, CELL_INCHES * len(flips) + 0.9), layout="constrained")
    figure.suptitle(title)
    heads = ("query", "old model finds (right)", "new model finds (wrong)")
    # A column for each picture, and one beside it for its words.
    grid = figure.subplots(len(flips), 6, squeeze=False, width_ratios=[1, 1.05] * 3)
    pictures = iter(read_pictures(folder, [n for flip in flips for n in (flip.query, flip.right, flip.wrong)]))
    for row, flip in enumerate(flips):
        cells = (
            (flip.query, ""),
            (flip.right, f"cosine {flip.right_score:.3f}"),
            (flip.wrong, f"cosine {flip.wrong_score:.3f}\nright one {flip.mate_score:.3f}"),
        )
        for column, (number, words) in enumerate(cells):
            _show(grid[row, 2 * column], next(pictures), ("0.4", "#009E73", "#D55E00")[column])
            _tell(grid[row, 2 * column + 1], f"{_broken(keys[number])}\n{words}")
            if row == 0:
                grid[row, 2 * column].set_title(heads[column], loc="left", fontsize=10)
    save_figure(figure, path)


def _show(axes: Axes, pixels: Pixels, colour: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=2.5)


def _tell(axes: Axes, words: str) -> None:
    axes.axis("off")
    axes.text(0, 0.5, words, transform=axes.transAxes, va="center", fontsize=8)


def _broken(key: str, width: int = 18) -> str:
    """A long key over several lines."""
    return "\n".join(key[start : start + width] for start in range(0, len(key), width))
