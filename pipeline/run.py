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

from pipeline import cluster
from pipeline.assessment import assess, inputs_digest, read_reports
from pipeline.config import RunConfig
from pipeline.console import bar, console, say, training_words
from pipeline.data.manifest import FILE_NAME, Manifest
from pipeline.data.packing import pack
from pipeline.data.store import open_store
from pipeline.data.store_metadata import metadata_folder
from pipeline.data.typefaces import Split, TypefaceSource
from pipeline.data.verify import Verification, verify
from pipeline.evaluation.compatibility import render_table
from pipeline.family import train_missing
from pipeline.files import write_json
from pipeline.generation import Generation
from pipeline.plan import Plan
from pipeline.registry import Registry
from pipeline.registry_store import tracking_location

REPORT = "report.json"


def run(config: RunConfig, fresh: bool = False) -> dict[str, Any]:
    """Do all of a run that is not done, and return its report.

    Args:
        config: of the run.
        fresh: forget what earlier runs of the same name left: artefacts, checkpoints, registered versions. The data
            stays.
    """
    uri, artifact_root = tracking_location(config.tracking, config.home)
    registry = Registry(uri, config.name, artifact_root)
    if fresh:
        registry.forget()
        shutil.rmtree(config.folder, ignore_errors=True)
    clock = Clock(config.folder / "seconds.json")
    with clock.time("data"):
        checks = prepare_data(config)
    older = older_generations(config, registry)
    generations = older | train_missing(config, registry, lambda plans: train_with_bars(plans, clock))
    for check in checks:
        check.wait()  # what the background found
    with clock.time("evaluation"):
        report = evaluate(config, registry, generations)
    report |= {"seconds": clock.seconds, "mlflow": registry.description()}
    write_json(config.folder / REPORT, report)
    tell(config, report, registry)
    return report


def older_generations(config: RunConfig, registry: Registry) -> dict[str, Generation]:
    """The parents that earlier runs have trained: registered, or refused before anything is trained."""
    parents = {parent for generation in config.generations.values() for parent in generation.parents}
    return {parent: registry.get(parent).open() for parent in sorted(parents - config.generations.keys())}


def prepare_data(config: RunConfig) -> list[Verification]:
    """Make the shards where the config says how, and check them against their manifests.

    Returns:
        The checks that may go on in the background.

    Raises:
        DataError: they are missing, empty, or not the ones that the manifest describes.
    """
    test = None if config.data.test is None else str(config.home / config.data.test)
    places: dict[Split, str | None] = {"train": config.train_location, "test": test}
    checks = []
    for split, location in places.items():
        if location is None:
            continue
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


def train_with_bars(plans: Sequence[Plan], clock: Clock) -> None:
    """Train on the cluster, a bar for each generation; the workers' start counts with the first."""
    cluster.connect()
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
        cluster.train_generations(plans, on_progress)


def evaluate(config: RunConfig, registry: Registry, generations: dict[str, Generation]) -> dict[str, Any]:
    """Assess the generations, unless the report that is there has just these inputs, and log what is found."""
    if config.data.test is None:
        return {"generations": list(generations), "metrics": {}, "criterion": {}, "update_gain": {}, "upgrades": []}
    test = config.home / config.data.test
    inputs = inputs_digest(config, generations, test)
    path = config.folder / REPORT
    if path.is_file() and (told := json.loads(path.read_text())).get("inputs") == inputs:
        return {key: value for key, value in told.items() if key not in ("seconds", "mlflow")}
    say("evaluating on the held-out images")
    report = {**assess(config, generations, test, config.folder), "inputs": inputs}
    _log(config, registry, generations, report)
    return report


def _log(config: RunConfig, registry: Registry, generations: dict[str, Generation], report: dict[str, Any]) -> None:
    """Write each generation's figures and the pictures to its run, and name the candidate."""
    pictures = sorted(config.folder.glob("*.png"))
    for name, generation in config.generations.items():
        label = "paragon" if generation.paragon_of else name
        figures = {
            f"{metric}/{pair}": value
            for metric, row in report["metrics"].items()
            for pair, value in row.items()
            if pair.startswith(f"{label}/")
        }
        registry.log_evaluation(name, figures, pictures)
    held = [one["new"] for one in report["upgrades"] if one["criterion"][f"{one['new']}/{one['old']}"]]
    registry.promote_candidate(held[-1] if held else next(iter(generations)))


def tell(config: RunConfig, report: dict[str, Any], registry: Registry) -> None:
    """Print the verdict, and where to look further."""
    for one in read_reports(report):
        console.print(render_table(one))
    say(f"report       {config.folder / REPORT}")
    say(f"pictures     {config.folder / 'det.png'}, matrix-*.png")
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
