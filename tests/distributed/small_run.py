"""A small training, whole or with faults, for tests of what it does when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipeline.compat.methods.bct import Bct
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.rows import batch_parts
from pipeline.training.loop import train
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.distributed.test_training import BACKBONE, MARGIN, TABLE, Batch, Notes, record
from tests.faults import Fault, install


def make_trainer(config: TrainingConfig, classifier: ClassifierConfig | None = None) -> Trainer:
    arguments = (BACKBONE, MARGIN, Bct(), config, classifier or ClassifierConfig(), "digest", 3)
    return Trainer("v1", TABLE, [], *arguments, device=torch.device("cpu"))


def part(batch: int, config: TrainingConfig, rank: int, world_size: int, odd: int | None = None) -> Batch:
    """A rank's part of a batch of easy images; those of batch `odd` are labelled at random."""
    parts = batch_parts(config.global_batch, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    generator = torch.Generator().manual_seed(batch)
    labels = torch.randint(4, (config.global_batch,), generator=generator)
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = patterns[labels] + 0.1 * torch.randn(config.global_batch, 1, 8, 8, generator=generator)
    labels = (labels + 5) % len(TABLE) if batch == odd else labels
    return Batch(images[mine], labels[mine], batch)


def run(
    rank: int,
    world_size: int,
    folder: str,
    config: TrainingConfig,
    faults: Sequence[Fault] = (),
    odd: int | None = None,
    left_out: Sequence[int] = (),
) -> list[tuple[int, dict[str, float]]]:
    """Train to the end, or to where a fault ends it; what rank 0's observer was told.

    Args:
        folder: of checkpoints, artefact, incidents.
        config: of the training.
        faults: that happen, each once in all runs in the folder.
        odd: a batch that is labelled at random.
        left_out: batches that the order does not have.
    """
    home = Path(folder)
    if faults:
        install(faults, home / "faults")
    trainer, notes = make_trainer(config), Notes([])

    def open_loader(start: int) -> Iterator[Batch]:
        numbers = [number for number in range(config.steps + 20) if number not in left_out]
        return iter([part(number, config, rank, world_size, odd) for number in numbers[start:]])

    places = home / "checkpoints", home / "v1"
    train(trainer, open_loader, notes, *places, record(config), TABLE, home / "incidents")
    return notes.seen
