"""A run whose number of ranks changes on the way: the same losses as one that was left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compat.methods.bct import Bct
from pipeline.generation import Generation
from pipeline.model.classifier import ClassifierConfig
from pipeline.training.engine import EngineConfig
from pipeline.training.loop import train
from pipeline.training.micro_batches import accumulation_on
from pipeline.training.stopping import Wish
from pipeline.training.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import BACKBONE, CONFIG, MARGIN, SGD, TABLE, Batch, Notes, batches, record

pytestmark = pytest.mark.faults

STAGES = (0, 1, 2, 3)
FULL = 2  # ranks for which the config was written
Seen = list[tuple[int, dict[str, float]]]


class Asked:
    """On the last rank alone: a wish from a number of steps on; the others know nothing of it."""

    def __init__(self, mine: bool, after: int | None, wish: Wish) -> None:
        self.left, self.wish = after if mine and after else 10**9, wish

    def __call__(self) -> Wish:
        self.left -= 1
        return self.wish if self.left <= 0 else Wish.GO_ON


def run_stages(
    rank: int, world_size: int, folder: str, stages: tuple[int, ...], after: int | None, wish: Wish
) -> dict[int, tuple[bool, Seen]]:
    """Train with each ZeRO stage until the last rank is asked to stop, or to the end."""
    found = {}
    for stage in stages:
        home = Path(folder) / str(stage)
        accumulation = accumulation_on(world_size, FULL, CONFIG.accumulation, CONFIG.global_batch)
        update = {"engine": EngineConfig(zero_stage=stage), "accumulation": accumulation, "optimiser": SGD}
        # At CONFIG's rate AdamW, which divides by small gradients, makes some 1e-4 of the rounding.
        config = CONFIG.model_copy(update=update)
        parents: list[Generation] = []
        arguments = (TABLE, parents, BACKBONE, MARGIN, Bct(), config, ClassifierConfig(), "digest", 3)
        trainer, notes = Trainer("v1", *arguments, device=torch.device("cpu")), Notes([])

        def open_loader(start: int) -> Iterator[Batch]:
            return batches(start, CONFIG.global_batch, rank, world_size)

        listen = Asked(rank == world_size - 1, after, wish)
        places = (home / "checkpoints", home / "v1")
        found[stage] = (
            train(trainer, open_loader, notes, *places, record(config), TABLE, home / "incidents", listen),
            notes.seen,
        )
    return found


def losses(parts: list[dict[int, tuple[bool, Seen]]], stage: int) -> dict[int, float]:
    return {step: figures["loss/v1"] for part in parts for step, figures in part[stage][1]}


def test_ranks_may_come_and_go_at_every_zero_stage(tmp_path: Path) -> None:
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    alone = [run_ranks(2, run_stages, whole, STAGES, None, Wish.NOW)[0]]
    parts = [
        run_ranks(ranks, run_stages, parted, STAGES, after, Wish.NOW)[0] for ranks, after in ((2, 2), (1, 3), (2, None))
    ]
    for stage in STAGES:
        assert [part[stage][0] for part in parts] == [False, False, True]
        steps = [[step for step, _ in part[stage][1]] for part in parts]
        assert steps == [[1, 2], [3, 4, 5], [6, 7]], "saved after the very step, and nothing done twice"
        assert losses(parts, stage) == pytest.approx(losses(alone, stage), rel=1e-5)
        generation = Generation(tmp_path / "parted" / str(stage) / "v1")
        generation.verify()


def test_wish_that_is_in_no_hurry_waits_for_the_checkpoint_that_is_due(tmp_path: Path) -> None:
    first = run_ranks(2, run_stages, str(tmp_path), (1,), 1, Wish.AT_CHECKPOINT)[0]
    assert first[1][0] is False
    assert [step for step, _ in first[1][1]] == [1, 2, 3], "checkpoints are due every three steps"
    second = run_ranks(1, run_stages, str(tmp_path), (1,), 4, Wish.AT_CHECKPOINT)[0]
    assert second[1][0], "asked in front of the last step: it is done, and the artefact sealed"
    assert [step for step, _ in second[1][1]] == [4, 5, 6, 7]


def test_agreement_is_of_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    results: list[Any] = run_ranks(3, run_stages, str(tmp_path), (0,), 2, Wish.NOW)
    assert [result[0][0] for result in results] == [False] * 3
    left = {path.name for path in (tmp_path / "0" / "checkpoints").iterdir()}
    assert left == {"step-00000002", "holder-digest.json"}
