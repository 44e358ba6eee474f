"""A run from end to end: data, the generations that are not there yet, their evaluation, the report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline import assessment, cluster, logs
from pipeline.config import RunConfig
from pipeline.console import bar, say, show, training_words
from pipeline.data.manifest import FILE_NAME, Manifest
from pipeline.data.packing import pack
from pipeline.data.store import open_store
from pipeline.data.store_metadata import metadata_folder
from pipeline.data.typefaces import Split, TypefaceSource
from pipeline.data.verify import Verification, verify
from pipeline.evaluation.rendering import render, verdicts
from pipeline.evaluation.report import SECTIONS
from pipeline.evaluation.stored import evaluable
from pipeline.family import train_missing
from pipeline.files import write_json
from pipeline.generation import Generation
from pipeline.plan import Plan
from pipeline.registry import Registry
from pipeline.registry_opening import open_registry
from pipeline.training.checkpoint_place import Place
from pipeline.workers.foreman import Progress

Train = Callable[[Sequence[Plan], Progress], None]  # carries out plans together, and tells how it goes


def run(config: RunConfig, fresh: bool = False, train: Train = cluster.train_generations) -> dict[str, Any]:
    """Do all of a run that is not done, and return its report.

    Args:
        config: of the run.
        fresh: forget what earlier runs of the same name left: artefacts, checkpoints, registered versions. The data
            stays.
        train: on Ray's workers, or whatever else there is.
    """
    logs.take_place(config.name)
    registry = open_registry(config)
    if fresh:
        registry.forget()
        for name in config.generations:
            Place(config.checkpoints(name)).clear()
        shutil.rmtree(config.folder, ignore_errors=True)
    clock = Clock(config.folder / "seconds.json")
    with clock.time("data"):
        checks = prepare_data(config)
    older = older_generations(config, registry)
    generations = older | train_missing(config, registry, lambda plans: train_with_bars(plans, clock, train))
    for check in checks:
        check.wait()  # what the background found
    with clock.time("evaluation"):
        report = evaluate(config, registry, evaluable(generations))
    report |= {"seconds": clock.seconds, "mlflow": registry.description()}
    write_json(config.folder / assessment.REPORT, report)
    tell(config, report, registry)
    return report


def older_generations(config: RunConfig, registry: Registry) -> dict[str, Generation]:
    """The parents that earlier runs have trained, or that were imported; what is amiss is refused before training.

    Raises:
        RegistryError: one is not registered.
        GenerationError: its artefact has changed, or a method needs what is not left of it.
        DataError: it was imported with test embeddings, but not of all test images.
    """
    parents = {parent for generation in config.generations.values() for parent in generation.parents}
    older = {parent: registry.get(parent).open() for parent in sorted(parents - config.generations.keys())}
    for generation in config.generations.values():
        for parent in older.keys() & set(generation.parents):
            generation.compat.check_parent(older[parent])
    if config.data.test is not None:
        assessment.check_stored(config, older)
    return older


def prepare_data(config: RunConfig) -> list[Verification]:
    """Make the shards where the config says how, and check them against their manifests.

    Returns:
        The checks that may go on in the background.

    Raises:
        DataError: they are missing, empty, or not the ones that the manifest describes.
    """
    held_out: dict[Split, Path | None] = {"validation": config.data.validation, "test": config.data.test}
    places: dict[Split, str] = {"train": config.train_location}
    places |= {split: str(config.home / path) for split, path in held_out.items() if path is not None}
    checks = []
    for split, location in places.items():
        folder = metadata_folder(location, config.data.store)
        if config.data.source == "typefaces" and not (folder / FILE_NAME).is_file():
            cluster.connect()
        if config.data.source == "typefaces":
            source = TypefaceSource(config.data.typefaces, config.home / "data" / "cache", split)
            with bar(f"pack {split}", len(source.parts()), "parts") as show:
                pack(source, folder, config.data.pack, lambda done, _, words: show(done, words))
        manifest = Manifest.load(folder)
        with closing(open_store(location, manifest, config.data.store)) as store:
            checks.append(verify(manifest, config.data.verify, store))
        rejected = sum(manifest.rejects.values())
        say(
            f"{split:<12} {manifest.samples:,} images of {manifest.identities_count:,} identities in "
            f"{len(manifest.shards)} shards, {rejected:,} rejected"
        )
    return checks


def train_with_bars(plans: Sequence[Plan], clock: Clock, train: Train = cluster.train_generations) -> None:
    """Train with a bar for each generation; the workers' start counts with the first."""
    steps = {plan.record.name: plan.config.generations[plan.record.name].training.steps for plan in plans}
    with ExitStack() as current:  # the bar and the clock of the generation in training
        shown: dict[str, Callable[[int, str], None]] = {}

        def on_progress(name: str, step: int, metrics: dict[str, float]) -> None:
            if name not in shown:
                if shown:  # the first bar's time began with the workers' start
                    current.close()
                    current.enter_context(clock.time(name))
                shown[name] = current.enter_context(bar(name, steps[name], "steps"))
            shown[name](step, training_words(metrics))

        current.enter_context(clock.time(plans[0].record.name))
        train(plans, on_progress)


def evaluate(config: RunConfig, registry: Registry, generations: dict[str, Generation]) -> dict[str, Any]:
    """Evaluate the generations on the test set, and name the candidate: the newest that is compatible with its parents.

    Without a test set there is a report without figures.
    """
    if config.data.test is None:
        return {"generations": list(generations), "criterion_on": [], **{section: {} for section in SECTIONS}}
    fresh = assessment.kept(config, generations, "test", config.folder) is None
    report = assessment.evaluate(config, registry, generations, "test", config.folder)
    if fresh:
        compatible = [name for name in generations if _fits_its_parents(name, generations[name], report)]
        registry.promote_candidate(compatible[-1] if compatible else next(iter(generations)))
    return report


def _fits_its_parents(name: str, generation: Generation, report: dict[str, Any]) -> bool:
    judged = [report["criterion"].get(f"{name}/{parent}") for parent in generation.record.parents]
    return bool(judged) and all(one is not None and one["held"] for one in judged)


def tell(config: RunConfig, report: dict[str, Any], registry: Registry) -> None:
    """Print the verdict, and where to look further."""
    if report["matrix"]:
        show(render(report))
    for line in verdicts(report):
        say(line)
    say(f"report       {config.folder / assessment.REPORT}, {assessment.MARKDOWN}")
    say(f"pictures     {config.folder}/*.png")
    command = registry.ui_command()
    here = f"{Path(sys.executable).parent}/" if command.startswith("mlflow ") else ""
    say(f"MLflow       {here}{command}")
    if dashboard := cluster.dashboard():
        say(f"Ray          {dashboard}")


class Clock:
    """Seconds of each stage, kept over interrupted runs: a stage that is found done keeps the time that it took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add a stage's wall-clock time."""
        began = time.monotonic()
        yield
        taken = round(time.monotonic() - began, 1)
        self.seconds[stage] = max(taken, self.seconds.get(stage, 0.0))
        write_json(self.path, self.seconds)
