"""The training loop, from the last checkpoint to the sealed artefact."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.generation import GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.training.checkpoint_place import Origin
from pipeline.training.guards import check_space, goes_on_from, memory_advice, note
from pipeline.training.meter import Meter, Telemetry
from pipeline.training.spikes import Course
from pipeline.training.stopping import Listen, Wish
from pipeline.training.trainer import Trainer
from pipeline.training.watchdog import Watchdog

log = logging.getLogger(__name__)

SELFTEST_IMAGES = 16


class Batch(Protocol):
    """A rank's part of one global batch."""

    @property
    def images_BCHW(self) -> Tensor: ...  # noqa: D102, N802
    @property
    def labels_B(self) -> Tensor: ...  # noqa: D102, N802

    def keys(self) -> list[str]:
        """Of the samples, in the order of the images."""


class Observer(Protocol):
    """Sees how a run goes; called on rank 0 alone, and must not block."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Take the figures after `step` updates: `loss/NAME` of each loss, `grad_norm/*`, `samples_per_s`.

        And, once there was one: `guards/unusable` steps on which nobody moved, `guards/spikes` of the loss.
        """


OpenLoader = Callable[[int], Iterable[Batch]]


def train(
    trainer: Trainer,
    open_loader: OpenLoader,
    observer: Observer,
    checkpoints: str | Path,
    destination: Path,
    record: GenerationRecord,
    identities: IdentityTable,
    incidents: Path,
    listen: Listen | None = None,
    telemetry: Telemetry | None = None,
) -> bool:
    """Train to the last step and seal the generation at `destination`, unless asked to stop before.

    Args:
        trainer: this rank's part of the run.
        open_loader: gives the endless batches from a number on.
        observer: told of losses and speed.
        checkpoints: folder or URL of this run's checkpoints.
        destination: where the artefact will lie; its parent folder is shared by all ranks.
        record: of the artefact, without files and figures.
        identities: the run's table.
        incidents: folder where each rank writes down what went wrong.
        listen: what this rank has been asked; None: nobody asks it.
        telemetry: told how fast this rank is, on every rank; None: nobody asks.

    Returns:
        Whether the generation is sealed; if not, the newest checkpoint is of the last step that was done.

    Raises:
        TrainingError: losses or gradients are no numbers once too often, or memory or disk are full.
    """
    config, pulse = trainer.config, trainer.pulse
    origin = Origin(parents=record.parents, data_digest=record.data_digest, code_version=record.code_version)
    trainer.checkpoints.origin = origin
    trainer.listen = listen or trainer.listen
    with Watchdog(pulse, config.guards.collective_timeout_s, incidents), memory_advice(trainer):
        meter, batches = Meter(trainer, telemetry), Batches(open_loader)
        watch = Watch(trainer, observer, incidents, meter, batches)
        with pulse("restore"):
            step = watch.last_saved = watch.last_step = trainer.restore(checkpoints)
        with trainer.checkpoints, meter:
            meter.forget()
            while step < config.steps:
                meter.begin(step)
                with pulse("load", step):
                    batch = batches.at(step + watch.course.skipped)
                losses_L, norms = trainer.step(batch.images_BCHW, batch.labels_B, step)
                if watch.spike(batch, losses_L, norms, step):
                    step = watch.go_back(checkpoints, step)
                    continue
                step += 1
                with pulse("report"):
                    watch.report(step, losses_L, norms)
                due = config.checkpoints.due(step, config.steps)
                if due or trainer.wish is Wish.NOW:
                    with pulse("save"):
                        watch.save(checkpoints, step)
                if trainer.wish is Wish.NOW or (trainer.wish is Wish.AT_CHECKPOINT and due and step < config.steps):
                    return False
        with pulse("export", step):
            after = step + watch.course.skipped  # of the step after the last: the same on a resume
            export(trainer, lambda: batches.at(after), destination, record, identities)
    return True


class Batches:
    """The endless batches by their numbers, which mostly are asked for one after the other."""

    def __init__(self, open_loader: OpenLoader) -> None:
        self._open_loader = open_loader
        self._loader: Iterable[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._next = 0

    @property
    def quarantined(self) -> int:
        """Samples that this rank found not to decode."""
        return int(getattr(self._loader, "quarantined", 0))

    @property
    def queued(self) -> int:
        """Batches that are read and wait to be decoded."""
        return int(getattr(self._loader, "queued", 0))

    def at(self, number: int) -> Batch:
        """The batch of a number; unless it is the next one, the loader is opened anew."""
        if self._loader is None or number != self._next:
            if isinstance(self._batches, Generator):
                self._batches.close()
            self._loader = self._open_loader(number)
            self._batches = iter(self._loader)
        self._next = number + 1
        return next(self._batches)


def export(
    trainer: Trainer,
    last_batch: Callable[[], Batch],
    destination: Path,
    record: GenerationRecord,
    identities: IdentityTable,
) -> None:
    """Write the artefact: each rank its rows, rank 0 the rest, with images of a batch for self-tests. Collective."""
    # Of this group alone: one that is believed lost may be writing its own.
    beside = destination.with_name(f".{destination.name}.{trainer.checkpoints.claim}.tmp")
    backbone, learned = trainer.engine.module_states()
    maps = trainer.companion.exported_maps(learned) if trainer.companion else []
    if trainer.rank == 0:
        for left in destination.parent.glob(f".{destination.name}.????????.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    rows = trainer.classifier
    if trainer.mesh.replica == 0:
        write_classifier_part(beside, rows.weight_CD.cpu(), rows.first_row, rows.end_row)
    dist.barrier()
    if trainer.rank == 0:
        images = last_batch().images_BCHW[:SELFTEST_IMAGES].cpu()
        seal(beside, destination, record, backbone, identities, images, maps)
    dist.barrier()


class Watch:
    """Guards the losses and tells the observer how the run goes.

    Attributes:
        last_saved: updates in the last checkpoint; 0: there is none.
        last_step: updates that the observer knows of.
    """

    def __init__(self, trainer: Trainer, observer: Observer, incidents: Path, meter: Meter, batches: Batches) -> None:
        self.trainer, self.observer, self.incidents = trainer, observer, incidents
        self.meter, self.batches = meter, batches
        self.course = Course()
        trainer.kept.update(self.course.kept)
        self.last_saved = self.last_step = 0
        self.last_time = time.monotonic()

    def spike(self, batch: Batch, losses_L: Tensor, norms: dict[str, float], step: int) -> bool:
        """Look at a step's figures, the same on all ranks; whether the run is to go back.

        Raises:
            TrainingError: nobody moved, once too often.
        """
        guards, rank = self.trainer.config.guards, self.trainer.rank
        if not norms:
            self._stood_still(batch, step)
            return False
        loss = float(losses_L.sum())
        above = self.course.add(loss, guards.spike_factor)
        if above is None:
            return False
        back = guards.rewind and self.last_saved > 0 and self.course.rewinds < guards.rewind_limit
        if rank == 0:
            known = {"step": step, "loss": loss, "deviations": above, "back_to": self.last_saved if back else None}
            note(self.incidents, "spikes", rank, known)
            log.warning("the loss leapt to %.4g at step %d, %.0f deviations above its median", loss, step, above)
        return back

    def _stood_still(self, batch: Batch, step: int) -> None:
        guards, trainer = self.trainer.config.guards, self.trainer
        self.course.stood_still()
        if trainer.rank == 0 or not trainer.sound_here:
            log.warning("loss or gradient is not a number at step %d: nobody moves", step)
        entry = {"step": step, "rank": trainer.rank, "here": not trainer.sound_here, "keys": batch.keys()}
        path = note(self.incidents, "nonfinite", trainer.rank, entry)
        if self.course.unusable > guards.nonfinite_limit:
            raise TrainingError(
                f"loss or gradient is not a number at step {step} and {self.course.unusable - 1} times before, though "
                f"nobody moved on them; {path.parent}/nonfinite-*.jsonl have the batches' keys: look at the data, or "
                f"lower training.optimiser.learning_rate; {goes_on_from(self.last_saved or None)}"
            )

    def save(self, checkpoints: str | Path, step: int) -> None:
        """Begin to write a checkpoint after `step` updates. Collective.

        Raises:
            TrainingError: it has no room, or the one before could not be written.
        """
        trainer = self.trainer
        check_space(checkpoints, trainer.state_bytes(), trainer.device, step, self.last_saved or None)
        trainer.counters = {"nonfinite": self.course.unusable, "quarantined": self.batches.quarantined}
        trainer.save(checkpoints, step)
        self.last_saved = step
        log.info("began to write the checkpoint of step %d", step)

    def go_back(self, checkpoints: str | Path, step: int) -> int:
        """Restore the last checkpoint after a spike at `step`, and skip the batches since. Collective."""
        before = self.course.counts()
        done = self.trainer.restore(checkpoints)
        self.course.goes_back(step + 1 - done, before)
        self.last_step, self.last_time = done, time.monotonic()
        self.meter.forget()
        return done

    def report(self, done: int, losses_L: Tensor, norms: dict[str, float]) -> None:
        """Every `log_every` steps and at the end, each rank tells of itself, and rank 0 the observer."""
        config = self.trainer.config
        if done % config.log_every and done != config.steps:
            return
        log.info("%d of %d steps, loss %.4g", done, config.steps, float(losses_L.sum()))
        self.meter.report(done, {"data/quarantined": self.batches.quarantined, "data/queue": self.batches.queued})
        if self.trainer.rank != 0:
            return
        now = time.monotonic()
        samples = (done - self.last_step) * config.global_batch
        figures = {f"loss/{name}": loss for name, loss in zip(self.trainer.loss_names, losses_L.tolist(), strict=True)}
        counts = {"guards/unusable": self.course.unusable, "guards/spikes": self.course.spikes}
        figures |= {name: float(count) for name, count in counts.items() if count}
        self.observer.report(done, {**figures, **norms, "samples_per_s": samples / max(now - self.last_time, 1e-9)})
        self.last_step, self.last_time = done, now
