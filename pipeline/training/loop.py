"""The training loop, from the last checkpoint to the sealed artefact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.generation import GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.training.trainer import Trainer

SELFTEST_IMAGES = 16


class Batch(Protocol):
    """A rank's part of one global batch."""

    @property
    def images_BCHW(self) -> Tensor: ...  # noqa: D102, N802
    @property
    def labels_B(self) -> Tensor: ...  # noqa: D102, N802


class Observer(Protocol):
    """Sees how a run goes; called on rank 0 alone, and must not block."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Take the figures after `step` updates: `loss/NAME` of each loss, `grad_norm/*`, `samples_per_s`."""


def train(
    trainer: Trainer,
    open_loader: Callable[[int], Iterable[Batch]],
    observer: Observer,
    checkpoints: Path,
    destination: Path,
    record: GenerationRecord,
    identities: IdentityTable,
) -> None:
    """Train to the last step and seal the generation at `destination`.

    Args:
        trainer: this rank's part of the run.
        open_loader: gives the endless batches from a step on.
        observer: told of losses and speed.
        checkpoints: folder of this run's checkpoints.
        destination: where the artefact will lie; its parent folder is shared by all ranks.
        record: of the artefact, without files and figures.
        identities: the run's table.
    """
    done = trainer.restore(checkpoints)
    batches = iter(open_loader(done))
    watch = Watch(trainer, observer, done)
    for step in range(done, trainer.config.steps):
        batch = next(batches)
        losses_L, norms = trainer.step(batch.images_BCHW, batch.labels_B, step)
        watch.check(losses_L, step)
        watch.report(step + 1, losses_L, norms)
        if (step + 1) % trainer.config.checkpoint_every == 0 or step + 1 == trainer.config.steps:
            trainer.save(checkpoints, step + 1)
    export(trainer, batches, destination, record, identities)


def export(
    trainer: Trainer, batches: Iterator[Batch], destination: Path, record: GenerationRecord, identities: IdentityTable
) -> None:
    """Write the artefact: each rank its rows, rank 0 the rest. Collective."""
    beside = destination.with_name(f".{destination.name}.tmp")
    backbone, learned = trainer.engine.module_states()
    maps = trainer.companion.exported_maps(learned) if trainer.companion else []
    if trainer.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    rows = trainer.classifier
    if trainer.mesh.replica == 0:
        write_classifier_part(beside, rows.weight_CD.cpu(), rows.first_row, rows.end_row)
    dist.barrier()
    if trainer.rank == 0:
        images = next(batches).images_BCHW[:SELFTEST_IMAGES].cpu()  # of the step after the last: the same on a resume
        seal(beside, destination, record, backbone, identities, images, maps)
    dist.barrier()


class Watch:
    """Guards the losses and tells the observer how the run goes."""

    def __init__(self, trainer: Trainer, observer: Observer, done: int) -> None:
        self.trainer, self.observer = trainer, observer
        self.unusable = 0
        self.last_step, self.last_time = done, time.monotonic()

    def check(self, losses_L: Tensor, step: int) -> None:
        """Count the steps on which nobody moved because a loss was no number.

        Raises:
            TrainingError: too many were not.
        """
        if torch.isfinite(losses_L).all():
            return
        self.unusable += 1
        if self.unusable > self.trainer.config.nonfinite_limit:
            raise TrainingError(
                f"loss is not a number at step {step} and {self.unusable - 1} times before; "
                "lower training.optimiser.learning_rate, or look at the data"
            )

    def report(self, done: int, losses_L: Tensor, norms: dict[str, float]) -> None:
        """Tell the observer, every `log_every` steps and at the end."""
        config = self.trainer.config
        if self.trainer.rank != 0 or (done % config.log_every and done != config.steps):
            return
        now = time.monotonic()
        samples = (done - self.last_step) * config.global_batch
        figures = {f"loss/{name}": loss for name, loss in zip(self.trainer.loss_names, losses_L.tolist(), strict=True)}
        self.observer.report(done, {**figures, **norms, "samples_per_s": samples / max(now - self.last_time, 1e-9)})
        self.last_step, self.last_time = done, now
