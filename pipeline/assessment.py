"""The evaluation of a run's generations on held-out images: the report, its pictures, what the registry is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.config import RunConfig
from pipeline.console import say, show
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.evaluation import pictures
from pipeline.evaluation.embedding import embed_all, read_labels
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import measure
from pipeline.evaluation.rendering import markdown, render, verdicts
from pipeline.evaluation.report import build_report
from pipeline.evaluation.stored import evaluable, has_stored, stored_vectors
from pipeline.files import write_atomically, write_json
from pipeline.generation import Generation
from pipeline.registry import Registry
from pipeline.registry_evaluation import record_evaluation
from pipeline.registry_opening import open_registry
from pipeline.schema import digest_json

REPORT, MARKDOWN, EMBEDDINGS = "report.json", "report.md", "embeddings"
FORMAT = 2  # of the report; one of another format is made again
Split = Literal["test", "validation"]


def held_out(config: RunConfig, split: Split) -> Path:
    """Folder of the split's shards.

    Raises:
        ConfigError: the config names none.
    """
    path = config.data.test if split == "test" else config.data.validation
    if path is None:
        raise ConfigError(f"data.{split} names no shards: nothing to evaluate; set it to the folder of the {split} set")
    return config.home / path


def check_stored(config: RunConfig, generations: dict[str, Generation]) -> None:
    """Check that imported generations brought embeddings of all test images, if of any.

    Raises:
        DataError: of some they did not.
        GenerationError: the embeddings' files have changed.
    """
    imported = [one for one in generations.values() if one.record.backbone is None and has_stored(one)]
    if imported:
        data = held_out(config, "test")
        keys = read_labels(data, Manifest.load(data), config.evaluation.group).keys
        for generation in imported:
            stored_vectors(generation, keys, data)


def lineage_of(config: RunConfig, generations: dict[str, Generation]) -> Lineage:
    """Parents as the artefacts record them, paragons as the config names them."""
    paragons = {one.paragon_of: name for name, one in config.generations.items() if one.paragon_of is not None}
    return Lineage(
        order=tuple(generations),
        parents={name: tuple(one.record.parents) for name, one in generations.items()},
        paragons={of: name for of, name in paragons.items() if of in generations and name in generations},
    )


def inputs_digest(config: RunConfig, generations: dict[str, Generation], data: Path) -> str:
    """Digest of all that an assessment depends on: an assessment of the same inputs need not be made again."""
    return digest_json(
        {
            "format": FORMAT,
            "generations": {name: generation.digest for name, generation in generations.items()},
            "paragons": dict(lineage_of(config, generations).paragons),
            "data": Manifest.load(data).digest,
            "evaluation": config.evaluation.model_dump(mode="json"),
        }
    )


def evaluate(
    config: RunConfig, registry: Registry, generations: dict[str, Generation], split: Split, folder: Path
) -> dict[str, Any]:
    """Assess generations on held-out images, log what is found, and write it.

    A report in `folder` that has just these inputs is read, and nothing is done.

    Args:
        config: of the run.
        registry: of its family; each generation's run gets its figures and the pictures, under `validation/` those of
            the validation set.
        generations: by name, oldest first.
        split: of the held-out images.
        folder: where report.json, report.md and the pictures go.

    Returns:
        What report.json holds: `evaluation.report.build_report`, and `inputs`, the digest of what it is made of.

    Raises:
        ConfigError: the config names no such split.
        DataError: its images cannot be read, or are too few for a figure.
        RegistryError: the store refuses.
    """
    told = kept(config, generations, split, folder)
    report = _measured(config, registry, generations, split, folder) if told is None else told
    if split == "test":  # a kept report too: a version may be a new one
        data = Manifest.load(held_out(config, split)).digest
        record_evaluation(registry, generations, report, data, again=told is not None)
    if told is None:  # last: until then nothing is kept, and all of it is done again
        write_json(folder / REPORT, report)
    return report


def _measured(
    config: RunConfig, registry: Registry, generations: dict[str, Generation], split: Split, folder: Path
) -> dict[str, Any]:
    """Measure, draw and log."""
    say(f"evaluating on the {split} images")
    data = held_out(config, split)
    report, drawn = assess(config, generations, data, folder)
    report |= {"inputs": inputs_digest(config, generations, data)}
    prefix = "" if split == "test" else f"{split}/"
    for name in generations:
        registry.log_evaluation(name, {f"{prefix}{key}": value for key, value in figures_of(report, name)}, drawn)
    return report


def kept(config: RunConfig, generations: dict[str, Generation], split: Split, folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, if it was made of just these inputs."""
    path = folder / REPORT
    told: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return told if told.get("inputs") == inputs_digest(config, generations, held_out(config, split)) else None


def assess(
    config: RunConfig, generations: dict[str, Generation], data: Path, folder: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Embed the held-out images with every generation, measure all pairs, judge and draw them.

    Args:
        config: of the run.
        generations: by name, oldest first.
        data: folder of the held-out shards.
        folder: where report.md and the pictures go.

    Returns:
        The report, and the files that were written.
    """
    embedded = embed_all(generations, data, config.evaluation.group, cache=config.folder / EMBEDDINGS)
    lineage = lineage_of(config, generations)
    mapped = {(name, older) for name, one in embedded.items() for older in one.mapped}
    pairs = lineage.pairs({name: one.vectors_ND.shape[1] for name, one in embedded.items()}, mapped)
    measured = measure(embedded, pairs, config.evaluation, det=True)
    report = build_report(measured, lineage, config.evaluation, embedded)
    write_atomically(folder / MARKDOWN, markdown(report, config.name).encode())
    drawn = pictures.draw(report, measured, lineage, folder)
    drawn += pictures.draw_flips(measured, lineage, embedded, data, config.evaluation.group, folder)
    return report, [folder / MARKDOWN, *drawn]


def figures_of(report: dict[str, Any], name: str) -> Sequence[tuple[str, float]]:
    """One generation's figures: `rank1/new on old`, `update_gain/rank1/new on old`, `negative_flips/new on old`.

    MLflow groups charts by what stands before the last slash: the pairs of a metric come side by side.
    """
    mine = f"{name}/"
    told = [
        (f"{metric}/{_on(pair)}", value["value"])
        for metric, row in report["matrix"].items()
        for pair, value in row.items()
        if pair.startswith(mine)
    ]
    told += [
        (f"update_gain/{metric}/{_on(pair)}", value["value"])
        for pair, gains in report["update_gain"].items()
        for metric, value in gains.items()
        if pair.startswith(mine) and value is not None
    ]
    told += [
        (f"negative_flips/{_on(pair)}", flips["negative"]["value"])
        for pair, flips in report["negative_flips"].items()
        if pair.startswith(mine)
    ]
    return [(key, value) for key, value in told if value is not None]


def _on(pair: str) -> str:
    return " on ".join(pair.split("/"))


def evaluate_run(config: RunConfig, names: Sequence[str] | None = None, split: Split = "test") -> dict[str, Any]:
    """Evaluate a run's trained generations, and print the verdict.

    Args:
        config: of the run.
        names: of the generations; None: all that are registered. They are evaluated in the config's order.
        split: of the held-out images.

    Returns:
        The report, as it is written to the run's folder `evaluation`, or `evaluation-validation`.

    Raises:
        ConfigError: a name is unknown or given twice, nothing is trained, or the config names no such split.
    """
    registry = open_registry(config)
    folder = evaluation_folder(config, split)
    report = evaluate(config, registry, trained(config, registry, names), split, folder)
    show(render(report))
    for line in verdicts(report):
        say(line)
    say(f"report       {folder / REPORT}, {MARKDOWN}, *.png")
    return report


def evaluation_folder(config: RunConfig, split: Split) -> Path:
    """Where an evaluation on a split is written."""
    return config.folder / ("evaluation" if split == "test" else f"evaluation-{split}")


def trained(config: RunConfig, registry: Registry, names: Sequence[str] | None) -> dict[str, Generation]:
    """The registered generations of a run's family: parents from earlier runs first, then in the config's order.

    Raises:
        ConfigError: a name is unknown or given twice, or is not trained yet, or nothing is.
    """
    parents = {parent for generation in config.generations.values() for parent in generation.parents}
    known = [*sorted(parents - config.generations.keys()), *config.generations]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--generations names {name!r}, which is not in the run; choose of {', '.join(known)}")
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"--generations names one twice: {','.join(names)}")
    registered = registry.versions()
    missing = [name for name in names or () if name not in registered]
    if missing:
        raise ConfigError(f"generation {missing[0]!r} is not trained yet: run jobs/train_bct.py with the same config")
    found = {name: registry.get(name).open() for name in known if name in registered and name in (names or known)}
    if names is None:
        found = evaluable(found)
    if not found:
        raise ConfigError(f"run {config.name!r} has no trained generation: run jobs/train_bct.py with the same config")
    return found
