"""Figures of the grid's pairs, each measured once and kept: a table of fifty cells goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.assessment import EMBEDDINGS, Split, held_out
from pipeline.console import bar
from pipeline.data.manifest import Manifest
from pipeline.evaluation.bootstrap import Estimate, difference, gain
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.embedding import embed_all
from pipeline.evaluation.measurement import measure
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.evaluation.templates import enrol_templates
from pipeline.files import write_json
from pipeline.generation import Generation
from pipeline.schema import digest_json
from pipeline.table.grid import Grid, Row

Figures = dict[str, Estimate]  # by metric
Trio = tuple[str, str, str | None]  # new model, old model, paragon
AT_ONCE = 4  # pairs between two writes


@dataclass(frozen=True)
class Judged:
    """One row of a table on one metric, as means over the seeds.

    Attributes:
        old: M(old, old).
        cross: M(new, old).
        new: M(new, new).
        paragon: M(paragon, paragon); None: the row has none.
        difference: of cross and old: the criterion holds where it is above 0.
        cost: of new and paragon.
        gain: update gain (Eq. 9); None where the criterion does not hold or there is no paragon.
    """

    old: Estimate
    cross: Estimate
    new: Estimate
    paragon: Estimate | None
    difference: Estimate
    cost: Estimate | None
    gain: Estimate | None


def pairs_of(grid: Grid, row: Row) -> list[tuple[str, str]]:
    """(query, gallery) of all that a row needs, over its seeds."""
    return [pair for trio in trios(grid, row) for pair in _pairs(trio)]


def _pairs(trio: Trio) -> list[tuple[str, str]]:
    new, old, paragon = trio
    return [(old, old), (new, old), (new, new), *([(paragon, paragon)] if paragon else [])]


def trios(grid: Grid, row: Row) -> list[Trio]:
    """New model, old model and paragon, for each seed of the new one."""
    olds, paragons = grid.generations(row.old), grid.generations(row.paragon) if row.paragon else [None]
    return [
        (new, olds[min(seed, len(olds) - 1)], paragons[min(seed, len(paragons) - 1)])
        for seed, new in enumerate(grid.generations(row.new))
    ]


def measure_pairs(
    grid: Grid,
    generations: Mapping[str, Generation],
    pairs: Sequence[tuple[str, str]],
    split: Split,
    templates: int = 0,
) -> dict[tuple[str, str], Figures]:
    """Measure what has not been measured, and read the rest.

    Args:
        grid: with the evaluation's config.
        generations: by name; all that `pairs` names.
        pairs: (query generation, gallery generation).
        split: of the held-out images.
        templates: of a table.
    """
    config = searched(grid.run.evaluation) if templates else grid.run.evaluation
    folder = held_out(grid.run, split)
    kept = grid.run.folder / "measured"
    manifest = Manifest.load(folder)

    def path(pair: tuple[str, str]) -> Path:
        made_of = {
            "pair": [generations[name].digest for name in pair],
            "manifest": manifest.digest,
            "evaluation": config.model_dump(mode="json"),
        } | ({"folds": templates} if templates else {})
        return kept / split / f"{'--'.join(pair)}-{digest_json(made_of)[:16]}.json"

    wanted = list(dict.fromkeys(pairs))
    missing = [pair for pair in wanted if not path(pair).is_file()]
    if missing:
        with bar(f"measure {split}", len(missing), "pairs") as show:
            for first in range(0, len(missing), AT_ONCE):
                part = missing[first : first + AT_ONCE]
                names = sorted({name for pair in part for name in pair})
                embedded = embed_all(
                    {name: generations[name] for name in names},
                    folder,
                    grid.run.evaluation.group,
                    cache=grid.run.folder / EMBEDDINGS,
                )
                figures = _measured(embedded, part, config, templates)
                for pair in part:
                    _write(path(pair), figures[pair])
                show(min(first + AT_ONCE, len(missing)), part[-1][0])
    return {pair: _read(path(pair)) for pair in wanted}


def _measured(
    embedded: Mapping[str, Embeddings], pairs: Sequence[tuple[str, str]], config: EvaluationConfig, templates: int
) -> dict[tuple[str, str], Figures]:
    """Measure pairs; with templates, the mean over the folds of groups that are enrolled."""
    if not templates:
        folds = [measure(embedded, pairs, config)]
    else:
        by_fold = {name: enrol_templates(one, templates, config.seed) for name, one in embedded.items()}
        count = len(next(iter(by_fold.values())))
        folds = [measure({name: of[fold] for name, of in by_fold.items()}, pairs, config) for fold in range(count)]
    return {
        (query, gallery): {
            metric: _mean([fold.estimate(query, gallery, metric) for fold in folds]) for metric in config.metric_names
        }
        for query, gallery in pairs
    }


def searched(config: EvaluationConfig) -> EvaluationConfig:
    """The figures of a search alone."""
    left = config.model_copy(update={"far": ()})
    judged = tuple(name for name in config.criterion_on if name in left.metric_names)
    return left.model_copy(update={"criterion_on": judged})


def measured_trios(grid: Grid, row: Row, measured: Mapping[tuple[str, str], Figures]) -> list[Trio]:
    """The seeds of a row of which all that it needs is there."""
    return [trio for trio in trios(grid, row) if measured.keys() >= set(_pairs(trio))]


def judge(grid: Grid, row: Row, measured: Mapping[tuple[str, str], Figures], metric: str) -> Judged:
    """A row on one metric, over the seeds that are measured: one at least."""
    parts = measured_trios(grid, row, measured)
    old = _mean([measured[old, old][metric] for _, old, _ in parts])
    cross = _mean([measured[new, old][metric] for new, old, _ in parts])
    new = _mean([measured[new, new][metric] for new, _, _ in parts])
    paragon = None
    if row.paragon is not None:
        paragon = _mean([measured[name, name][metric] for _, _, name in parts if name is not None])
    return Judged(
        old=old,
        cross=cross,
        new=new,
        paragon=paragon,
        difference=difference(cross, old),
        cost=difference(new, paragon) if paragon else None,
        gain=gain(cross, old, paragon) if paragon else None,
    )


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds, replicate by replicate: all seeds are measured on the same draws of identities."""
    replicates_R = np.mean([one.replicates_R for one in estimates], axis=0)
    return Estimate(float(np.mean([one.value for one in estimates])), replicates_R)


def _write(path: Path, figures: Figures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path, {name: {"value": one.value, "replicates": one.replicates_R.tolist()} for name, one in figures.items()}
    )


def _read(path: Path) -> Figures:
    told = json.loads(path.read_text())
    return {name: Estimate(one["value"], np.array(one["replicates"], np.float64)) for name, one in told.items()}
