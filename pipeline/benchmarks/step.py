"""What Ray, the loader and tracking add to a training step: the product beside a bare loop over made-up tensors.

All sides have the same number of processes, model, classifier and optimiser. The bare one is started without Ray, and
does nothing but `Trainer.step`. A third one, `fed`, is the bare one over the loader's batches: what is left of the
overhead is Ray's and the tracking's.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pipeline import cluster
from pipeline.benchmarks.measure import machine
from pipeline.config import RunConfig, load_config
from pipeline.data.manifest import FILE_NAME, Manifest
from pipeline.data.store import open_store
from pipeline.data.store_metadata import metadata_folder
from pipeline.errors import ConfigError
from pipeline.family import train_missing
from pipeline.identities import IdentityTable
from pipeline.model.rows import batch_parts
from pipeline.plan import Plan
from pipeline.registry import Registry
from pipeline.schema import Config
from pipeline.tracking.journal import Journal
from pipeline.workers.config import THREADS
from pipeline.workers.rank import make_loader, make_trainer

POOL = 8  # made-up batches, taken in turns
SPEED = "samples_per_s"


class StepBenchmark(Config):
    """What is measured."""

    config: str = Field("configs/quickstart.yaml", description="of a run whose data are there")
    generation: str = Field("v2-paragon", description="of the run, without parents; it is trained anew, and removed")
    workers: int | None = Field(None, ge=1, description="training processes; none: as many as the run has")
    steps: int = Field(300, ge=40, description="of each side in a round")
    every: int = Field(10, ge=1, description="steps of a measurement; the first two are left out")
    rounds: int = Field(3, ge=1, description="of both sides in turns; medians are told")


def measure_step(config: StepBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file.

    `overhead` is how much longer a step of the product takes than a bare one, as a share of the bare one: the median
    of the rounds.

    Raises:
        ConfigError: the run has no such generation, it has parents, or the data are not there.
    """
    run = _run_config(config)
    os.environ.update(THREADS)
    rounds: list[dict[str, float]] = []
    try:
        for number in range(1, config.rounds + 1):
            progress(f"round {number} of {config.rounds}: the product")
            plan, speeds = _product(run)
            ms = {"product": _step_ms(speeds, config, run)}
            for side in ("bare", "fed"):
                progress(f"round {number} of {config.rounds}: {side}")
                ms[side] = _step_ms(_without_ray(plan, config, fed=side == "fed"), config, run)
            rounds.append(ms)
            shutil.rmtree(run.folder)
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)
    return {
        "benchmark": "step",
        **machine(torch.device("cpu")),
        "run": Path(config.config).stem,
        "generation": config.generation,
        "workers": run.cluster.workers,
        "dashboard": bool(cluster.dashboard()),  # Ray's; one that the benchmark starts has none
        "global_batch": run.generations[config.generation].training.global_batch,
        "overhead": statistics.median(ms["product"] / ms["bare"] - 1 for ms in rounds),
        "overhead_of_loader": statistics.median(ms["fed"] / ms["bare"] - 1 for ms in rounds),
        "step_ms": {side: statistics.median(ms[side] for ms in rounds) for side in rounds[0]},
        "rounds": rounds,
    }


def _run_config(config: StepBenchmark) -> RunConfig:
    whole = load_config(Path(config.config))
    if config.generation not in whole.generations or whole.generations[config.generation].parents:
        free = [name for name, one in whole.generations.items() if not one.parents]
        raise ConfigError(
            f"{config.config} has no generation {config.generation!r} without parents: take one of {free}"
        )
    if not (metadata_folder(whole.train_location, whole.data.store) / FILE_NAME).is_file():
        raise ConfigError(
            f"{whole.train_location} has no shards: run jobs/train_bct.py --config {config.config} before, or set "
            "BCT_HOME to where that was done"
        )
    generation = whole.generations[config.generation]
    checkpoints = generation.training.checkpoints.model_copy(update={"every": 10 * config.steps})
    training = generation.training.model_copy(
        update={"steps": config.steps, "log_every": config.every, "checkpoints": checkpoints}
    )
    only = {config.generation: generation.model_copy(update={"training": training, "paragon_of": None})}
    workers = whole.cluster.model_copy(update={"workers": config.workers or whole.cluster.workers})
    name = f"benchmark-{uuid.uuid4().hex[:8]}"
    return whole.model_copy(update={"name": name, "generations": only, "cluster": workers})


def _step_ms(samples_per_s: list[float], config: StepBenchmark, run: RunConfig) -> float:
    batch = run.generations[config.generation].training.global_batch
    return 1e3 * batch / statistics.median(samples_per_s[2:])


def _product(run: RunConfig) -> tuple[Plan, list[float]]:
    """Train as the job does, and read the speed that it has recorded of each measurement."""
    kept: list[Plan] = []
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(f"sqlite:///{folder}/mlflow.db", run.name, Path(folder))

        def train(plans: Any) -> None:
            kept.extend(plans)
            cluster.train_generations(plans, lambda *_: None)

        train_missing(run, registry, train)
    told, _ = Journal(kept[0].journal).read(0, sys.maxsize)
    return kept[0], [one.value for one in told if one.key == SPEED]


def _without_ray(plan: Plan, config: StepBenchmark, fed: bool) -> list[float]:
    """Samples a second of each measurement, over made-up tensors, or `fed` by the loader."""
    ranks = plan.config.cluster.workers
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, plan, config, fed, Path(folder)), ranks)
        speeds: list[float] = json.loads((Path(folder) / "speeds.json").read_text())
    return speeds


def _rank(rank: int, ranks: int, plan: Plan, config: StepBenchmark, fed: bool, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    torch.set_num_threads(plan.config.cluster.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    identities, cpu = IdentityTable.load(plan.identities), torch.device("cpu")
    trainer = make_trainer(plan, identities, cpu)
    batches = _batches(plan, identities, cpu) if fed else _made_up(plan, len(identities))
    speeds, began = [], time.perf_counter()
    for step in range(config.steps):
        trainer.step(*next(batches), step)
        if (step + 1) % config.every == 0:
            now = time.perf_counter()
            speeds.append(config.every * trainer.config.global_batch / (now - began))
            began = now
    if rank == 0:
        (folder / "speeds.json").write_text(json.dumps(speeds))
    dist.barrier()
    dist.destroy_process_group()


def _made_up(plan: Plan, identities: int) -> Iterator[tuple[Tensor, Tensor]]:
    preprocess = plan.config.preprocess
    global_batch = plan.config.generations[plan.record.name].training.global_batch
    samples = batch_parts(global_batch, dist.get_world_size())[dist.get_rank()]
    shape = (POOL, samples, preprocess.channels, preprocess.size, preprocess.size)
    images = [one.contiguous(memory_format=torch.channels_last) for one in torch.randn(shape)]
    return cycle(zip(images, torch.randint(0, identities, (POOL, samples)), strict=True))


def _batches(plan: Plan, identities: IdentityTable, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    stored = plan.config.data.store
    manifest = Manifest.load(metadata_folder(plan.data, stored))
    with closing(open_store(plan.data, manifest, stored)) as store:
        for batch in make_loader(plan, manifest, identities, store, device, 0):
            yield batch.images_BCHW, batch.labels_B
