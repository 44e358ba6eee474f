"""Which pictures an evaluation has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.evaluation import plots
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.embedding import read_labels
from pipeline.evaluation.flip_gallery import plot_flips, worst_flips
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import Measurements

MOST_CURVES = 8  # in one picture


def draw(report: Mapping[str, Any], measured: Measurements, lineage: Lineage, folder: Path) -> list[Path]:
    """Draw a matrix for each metric, the DET curves and the backfill curves.

    Args:
        report: as `report.build_report` returned it.
        measured: what it was made of.
        lineage: of the family.
        folder: where the pictures go: matrix-METRIC.png, det.png, backfill-METRIC.png.

    Returns:
        The files.
    """
    drawn = [_draw_matrix(report, metric, folder) for metric in report["matrix"]]
    curves = {label: one.det for label, one in measured.pairs.items() if one.det is not None}
    if curves:
        shown = set(curves if len(curves) <= MOST_CURVES else newest(lineage)[:MOST_CURVES])
        chosen = {label: curve for label, curve in curves.items() if label in shown}
        bands = {name: (one.band_far_J, one.low_J, one.high_J) for name, one in chosen.items() if one.band_far_J.size}
        drawn.append(folder / "det.png")
        plots.plot_det({name: (one.far_K, one.frr_K) for name, one in chosen.items()}, drawn[-1], bands)
    return drawn + _draw_backfill(report, lineage, folder)


def newest(lineage: Lineage) -> list[str]:
    """The pairs that tell most of the newest generation that serves: its own, those with its ancestors, and theirs."""
    name = lineage.served()[-1]
    ancestors = [older for older in reversed(lineage.order) if older in lineage.ancestors(name)]
    pairs = [f"{name}/{name}", *(pair for older in ancestors for pair in (f"{name}/{older}", f"{older}/{older}"))]
    paragon = lineage.paragons.get(name)
    return [pairs[0], *([f"{paragon}/{paragon}"] if paragon else []), *pairs[1:]]


def _draw_matrix(report: Mapping[str, Any], metric: str, folder: Path) -> Path:
    names = report["generations"]
    values_QG = np.full((len(names), len(names)), np.nan)
    for pair, value in report["matrix"][metric].items():
        row, column = (names.index(side) for side in pair.split("/"))
        values_QG[row, column] = value["value"]
    held = {pair: judged["held"] for pair, judged in report["criterion"].items()}
    path = folder / f"matrix-{in_file(metric)}.png"
    plots.plot_matrix(names, values_QG, metric, path, held)
    return path


def _draw_backfill(report: Mapping[str, Any], lineage: Lineage, folder: Path) -> list[Path]:
    told = {pair: curves for pair, curves in report["backfill"].items() if curves}
    name = lineage.served()[-1] if lineage.served() else ""
    if len(told) > MOST_CURVES // 2:
        told = dict([item for item in told.items() if item[0].startswith(f"{name}/")][-MOST_CURVES // 2 :])
    drawn = []
    for metric in next(iter(told.values()))["random"]["area"] if told else ():
        curves = {}
        for pair, each in told.items():
            old = pair.split("/")[1]
            before = report["matrix"][metric][f"{old}/{old}"]["value"] if metric in report["matrix"] else None
            curves[pair] = plots.BackfillCurve(
                each["share"], each["random"][metric], each["uncertainty"][metric], before
            )
        drawn.append(folder / f"backfill-{in_file(metric)}.png")
        plots.plot_backfill(curves, metric, drawn[-1])
    return drawn


def draw_flips(
    measured: Measurements,
    lineage: Lineage,
    embedded: Mapping[str, Embeddings],
    data: Path,
    group: str,
    folder: Path,
) -> list[Path]:
    """Draw the worst negative flips of each generation against each of its parents, where there are any.

    Args:
        measured: with the outcomes of the searches.
        lineage: of the family.
        embedded: the test images by generation.
        data: folder of their shards.
        group: the attribute that is not compared within.
        folder: where the pictures go: flips-NEW-OLD.png.

    Returns:
        The files.
    """
    drawn: list[Path] = []
    keys: tuple[str, ...] = ()
    for new, old in lineage.upgrades():
        if old not in lineage.parents[new] or f"{new}/{old}" not in measured:
            continue
        before, after = measured[f"{old}/{old}"].outcomes, measured[f"{new}/{old}"].outcomes
        if before is None or after is None:
            continue
        if flips := worst_flips(embedded[new], embedded[old], before, after, measured.images):
            keys = keys or read_labels(data, Manifest.load(data), group).keys
            drawn.append(folder / f"flips-{new}-{old}.png")
            title = f"Worst negative flips: {new} instead of {old} on {old}'s gallery"
            plot_flips(flips, data, keys, title, drawn[-1])
    return drawn


def in_file(metric: str) -> str:
    """A metric's name as part of a file's name."""
    return metric.replace("@", "-at-")
