"""The verdict on a run's upgrades: every pair measured, the criterion, the update gain, the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.evaluation import plots
from pipeline.evaluation.compatibility import Embeddings, Report, build_report, compared_scores, cross_test
from pipeline.evaluation.embedding import embed
from pipeline.evaluation.metrics import det_curve
from pipeline.generation import Generation
from pipeline.schema import digest_json


@dataclass(frozen=True)
class Upgrade:
    """A generation, a parent whose gallery it searches, and the paragon that measures what is lost."""

    new: str
    old: str
    paragon: str | None


def upgrades_of(config: RunConfig) -> list[Upgrade]:
    """Every (generation, parent) of a run."""
    paragons = {one.paragon_of: name for name, one in config.generations.items() if one.paragon_of}
    return [
        Upgrade(name, parent, paragons.get(name))
        for name, generation in config.generations.items()
        for parent in generation.parents
    ]


def inputs_digest(config: RunConfig, generations: dict[str, Generation], test: Path) -> str:
    """Digest of all that an assessment depends on: an assessment of the same inputs need not be made again."""
    return digest_json(
        {
            "generations": {name: generation.digest for name, generation in generations.items()},
            "test": Manifest.load(test).digest,
            "evaluation": config.evaluation.model_dump(mode="json"),
        }
    )


def assess(config: RunConfig, generations: dict[str, Generation], test: Path, folder: Path) -> dict[str, Any]:
    """Embed the held-out images with every generation, compare all pairs, and draw them.

    Args:
        config: of the run.
        generations: by name, oldest first.
        test: folder of the held-out shards.
        folder: where the pictures go: det.png, and matrix-METRIC.png for each metric.

    Returns:
        The parts of report.json that the measurements give.
    """
    embedded = {name: embed(one, test, config.evaluation.group) for name, one in generations.items()}
    pairs = {
        f"{new}/{old}": cross_test(embedded[new], embedded[old], config.evaluation)
        for old, new in combinations_with_replacement(embedded, 2)
        if embedded[new].vectors_ND.shape[1] >= embedded[old].vectors_ND.shape[1]
    }
    reports = [_report(config, upgrade, pairs) for upgrade in upgrades_of(config)]
    _draw(embedded, pairs, reports, folder)
    merged: dict[str, Any] = {"generations": list(generations), "metrics": {}, "criterion": {}, "update_gain": {}}
    if not reports:
        merged["metrics"] = {m: {label: pairs[label][m] for label in pairs} for m in config.evaluation.metric_names}
    for report in reports:
        told = report.to_json()
        for metric, row in told["metrics"].items():
            merged["metrics"].setdefault(metric, {}).update(row)
        merged["criterion"] |= told["criterion"]
        merged["update_gain"] = told["update_gain"]
    return {**merged, "upgrades": [{"old": r.old, "new": r.new, **r.to_json()} for r in reports]}


def read_reports(told: dict[str, Any]) -> list[Report]:
    """The reports on each upgrade, as `assess` returned them."""
    return [
        Report(
            old=one["old"],
            new=one["new"],
            generations=tuple(one["generations"]),
            metrics=one["metrics"],
            criterion=one["criterion"],
            criterion_on=tuple(one["criterion_on"]),
            update_gain=one["update_gain"],
        )
        for one in told["upgrades"]
    ]


def _report(config: RunConfig, upgrade: Upgrade, pairs: dict[str, dict[str, float]]) -> Report:
    of_interest = {upgrade.old, upgrade.new, upgrade.paragon}
    needed = {label: values for label, values in pairs.items() if set(label.split("/")) <= of_interest}
    needed.pop(f"{upgrade.paragon}/{upgrade.new}", None)
    return build_report(needed, upgrade.old, upgrade.new, upgrade.paragon, config.evaluation.criterion_on)


def _draw(
    embedded: dict[str, Embeddings], pairs: dict[str, dict[str, float]], reports: list[Report], folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    for label in pairs:
        new, old = label.split("/")
        scores = compared_scores(embedded[new], embedded[old])
        curves[label] = det_curve(scores)
    plots.plot_det(curves, folder / "det.png")
    names = list(embedded)
    verdicts = {label: held for report in reports for label, held in report.criterion.items()}
    for metric in next(iter(pairs.values())):
        values = np.full((len(names), len(names)), np.nan)
        for label, measured in pairs.items():
            row, column = (names.index(side) for side in label.split("/"))
            values[row, column] = measured[metric]
        plots.plot_matrix(names, values, metric, folder / f"matrix-{metric.replace('@', '-at-')}.png", verdicts)
