"""What Ray, the loader and tracking add to a training step: the product beside a bare loop over made-up tensors.

Both sides have the same number of processes, model, classifier and optimiser. The bare one is started without Ray, and
does nothing but `Trainer.step`.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch.multiprocessing.spawn import spawn

from pipeline import cluster
from pipeline.benchmarks.measure import machine
from pipeline.config import RunConfig, load_config
from pipeline.data.manifest import FILE_NAME
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
from pipeline.workers.rank import make_trainer

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
    product, bare = [], []
    try:
        for number in range(1, config.rounds + 1):
            progress(f"round {number} of {config.rounds}: the product")
            plan, speeds = _product(run)
            product.append(_step_ms(speeds, config, run))
            progress(f"round {number} of {config.rounds}: bare")
            bare.append(_step_ms(_bare(plan, config), config, run))
            shutil.rmtree(run.folder)
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)
    return {
        "benchmark": "step",
        **machine(torch.device("cpu")),
        "run": Path(config.config).stem,
        "generation": config.generation,
        "workers": run.cluster.workers,
        "global_batch": run.generations[config.generation].training.global_batch,
        "overhead": statistics.median(one / other - 1 for one, other in zip(product, bare, strict=True)),
        "step_ms": {"product": statistics.median(product), "bare": statistics.median(bare)},
        "rounds": [{"product": one, "bare": other} for one, other in zip(product, bare, strict=True)],
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


def _bare(plan: Plan, config: StepBenchmark) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_bare_rank, (plan.config.cluster.workers, plan, config, Path(folder)), plan.config.cluster.workers)
        speeds: list[float] = json.loads((Path(folder) / "speeds.json").read_text())
    return speeds


def _bare_rank(rank: int, ranks: int, plan: Plan, config: StepBenchmark, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    torch.set_num_threads(max(1, int(plan.config.cluster.cpus_per_worker)))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    identities, preprocess = IdentityTable.load(plan.identities), plan.config.preprocess
    trainer = make_trainer(plan, identities, torch.device("cpu"))
    samples = batch_parts(trainer.config.global_batch, ranks)[rank]
    shape = (POOL, samples, preprocess.channels, preprocess.size, preprocess.size)
    images = [one.contiguous(memory_format=torch.channels_last) for one in torch.randn(shape)]
    labels = torch.randint(0, len(identities), (POOL, samples))
    speeds, began = [], time.perf_counter()
    for step in range(config.steps):
        trainer.step(images[step % POOL], labels[step % POOL], step)
        if (step + 1) % config.every == 0:
            now = time.perf_counter()
            speeds.append(config.every * trainer.config.global_batch / (now - began))
            began = now
    if rank == 0:
        (folder / "speeds.json").write_text(json.dumps(speeds))
    dist.barrier()
    dist.destroy_process_group()
