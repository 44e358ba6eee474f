"""One rank's training of a generation, whoever started it: from its loader to the sealed artefact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from pipeline import logs
from pipeline.compat.views import ImagesOf
from pipeline.data.loader import TrainingLoader, iterate_identities
from pipeline.data.manifest import Manifest
from pipeline.data.quarantine import Quarantine
from pipeline.data.store import ShardFiles, open_store
from pipeline.data.store_metadata import metadata_folder
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.plan import Plan
from pipeline.training.loop import Observer, train
from pipeline.training.meter import Telemetry
from pipeline.training.micro_batches import accumulation_on
from pipeline.training.stopping import Listen
from pipeline.training.trainer import Trainer

MEANS_BATCH = 256  # images at a time, where a method asks for class means


class RankObserver(Observer, Protocol):
    """Sees how a run goes, and how fast its own rank is."""

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """Take this rank's own figures after `step` updates (see `Meter.report`)."""


def train_rank(plan: Plan, device: torch.device, observer: RankObserver, listen: Listen) -> bool:
    """Carry out a plan together with the other ranks of the process group. Collective.

    Args:
        plan: the same on all ranks.
        device: of this rank.
        observer: rank 0's is told how it goes.
        listen: what this rank has been asked.

    Returns:
        Whether the artefact is sealed; if not, they were asked to stop, and have saved a checkpoint.
    """
    config, folder = plan.config, metadata_folder(plan.data, plan.config.data.store)
    torch.set_num_threads(config.cluster.threads)
    identities, manifest = IdentityTable.load(plan.identities), Manifest.load(folder)
    store = open_store(plan.data, manifest, config.data.store)

    def images_of(first_row: int, end_row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        part = (identities, first_row, end_row, config.preprocess, MEANS_BATCH)
        return iterate_identities(folder, manifest, *part, threads=config.cluster.threads, device=device, store=store)

    trainer = make_trainer(plan, identities, device, images_of)
    open_loader = partial(make_loader, plan, manifest, identities, store, device)
    logs.take_place(config.name, plan.record.name, dist.get_rank(), lambda: trainer.pulse.step)
    telemetry = Telemetry(observer.measured, plan.quarantine.parent / "traces")
    with closing(store):
        places = (plan.checkpoints, plan.destination)
        told = (listen, telemetry)
        return train(trainer, open_loader, observer, *places, plan.record, identities, plan.quarantine, *told)


def make_loader(
    plan: Plan, manifest: Manifest, identities: IdentityTable, store: ShardFiles, device: torch.device, start_step: int
) -> TrainingLoader:
    """This rank's batches of a plan's training.

    Args:
        plan: the same on all ranks.
        manifest: of the plan's data.
        identities: the plan's table.
        store: of the data's shards.
        device: of this rank.
        start_step: the first batch's number.
    """
    config = plan.config
    generation = config.generations[plan.record.name]
    return TrainingLoader(
        metadata_folder(plan.data, config.data.store),
        manifest,
        identities,
        config.preprocess,
        generation.augment,
        seed=generation.seed,
        global_batch=generation.training.global_batch,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        order=config.data.order,
        threads=config.cluster.threads,
        device=device,
        start_step=start_step,
        store=store,
        quarantine=Quarantine(plan.quarantine, dist.get_rank(), config.data.quarantine_limit),
        patience_s=generation.training.guards.loader_timeout_s,
    )


def make_trainer(
    plan: Plan, identities: IdentityTable, device: torch.device, images_of: ImagesOf | None = None
) -> Trainer:
    """This rank's part of a plan's training, before its first step. Collective.

    Args:
        plan: the same on all ranks.
        identities: the plan's table.
        device: of this rank.
        images_of: as `Trainer` takes it.
    """
    config = plan.config
    generation = config.generations[plan.record.name]
    training = generation.training
    micro_batches = accumulation_on(
        dist.get_world_size(), config.cluster.workers, training.accumulation, training.global_batch
    )
    return Trainer(
        plan.record.name,
        identities,
        [Generation(path) for path in plan.parents],
        generation.backbone,
        generation.margin,
        generation.compat,
        training.model_copy(update={"accumulation": micro_batches}),
        generation.classifier,
        plan.record.config_digest,
        generation.seed,
        device,
        images_of,
    )
