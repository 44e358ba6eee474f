"""The later methods train: their statistics of a real parent's features, their companions under DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.compat.methods import METHODS
from pipeline.generation import Generation
from pipeline.model.classifier import ClassifierConfig
from pipeline.training.engine import EngineConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import BACKBONE, MARGIN, SGD, TABLE, batches, make_parent

NAMES = {
    "ract": ["v1"],
    "nccl": ["v1"],
    "lce": ["v1", "v1/boundary"],
    "advbct": ["v1/boundary", "v1/adversarial"],
    "mixbct": [],
    "unibct": ["v1"],
}


def images_of(first_row: int, end_row: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Three images of every identity but the last."""
    rows = torch.arange(len(TABLE) - 1).repeat(3)
    images = torch.randn(len(rows), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    inside = (rows >= first_row) & (rows < end_row)
    yield from zip(images[inside].split(4), rows[inside].split(4), strict=True)


def two_steps(rank: int, world_size: int, folder: str) -> dict[str, tuple[list[str], list[list[float]]]]:
    """Names and losses of each method, by accumulation, at a ZeRO stage of its own."""
    found = {}
    for number, name in enumerate(NAMES):
        engine = EngineConfig(zero_stage=(0, 1, 3)[number % 3])
        config = TrainingConfig(steps=2, global_batch=9, accumulation=2, optimiser=SGD, engine=engine)
        trainer = Trainer(
            "v2",
            TABLE,
            [Generation(Path(folder) / "parent")],
            BACKBONE,
            MARGIN,
            METHODS[name](method=name),
            config,
            ClassifierConfig(),
            "digest",
            3,
            torch.device("cpu"),
            images_of,
        )
        shown = batches(0, config.global_batch, rank, world_size)
        losses = []
        for step in range(config.steps):
            batch = next(shown)
            losses.append(trainer.step(batch.images_BCHW, batch.labels_B, step)[0].tolist())
        found[name] = (trainer.loss_names, losses)
    return found


def test_each_trains_under_deepspeed_with_accumulation(tmp_path: Path) -> None:
    run_ranks(1, make_parent, str(tmp_path))
    first, second = run_ranks(2, two_steps, str(tmp_path))
    assert first == second
    for name, (names, losses) in first.items():
        assert names == ["v2", *NAMES[name]]
        assert all(math.isfinite(value) and value >= 0 for step in losses for value in step)
        assert name == "lce" or all(value > 0 for value in losses[0]), f"{name}: no loss to learn from"
