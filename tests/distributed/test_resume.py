"""Killed and resumed equals never killed: weights, optimiser, classifier, batches and losses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from pipeline.compat.methods.bct import Bct
from pipeline.generation import Generation
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.loop import train
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.distributed.ranks import LOST, lose_ranks, run_ranks
from tests.distributed.small_parents import use_plain_backbones
from tests.distributed.test_training import MARGIN, TABLE, Batch, batches, make_parent, record, tensors

STEPS, EVERY, GLOBAL_BATCH = 8, 3, 9
CONFIG = TrainingConfig(
    steps=STEPS,
    global_batch=GLOBAL_BATCH,
    checkpoints=CheckpointConfig(every=EVERY),
    log_every=1,
    optimiser=OptimiserConfig(learning_rate=0.01),
)


class Diary:
    """An observer that a kill does not silence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def report(self, step: int, metrics: dict[str, float]) -> None:
        told = {key: value for key, value in metrics.items() if key != "samples_per_s"}
        write(self.path, {"step": step, **told})


def write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(folder: Path, plain: bool) -> Trainer:
    if plain:
        use_plain_backbones()
    backbone = BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4, dropout=0.0 if plain else 0.1)
    parents = [Generation(folder / "parent")] if (folder / "parent").exists() else []
    classifier = ClassifierConfig(sample_rate=1.0 if plain else 0.7)
    arguments = (backbone, MARGIN, Bct(weight=0.5), CONFIG, classifier, "digest", 3, torch.device("cpu"))
    return Trainer("v2", TABLE, parents, *arguments)


def run(rank: int, world_size: int, folder: Path, plain: bool, kill_at: int | None) -> None:
    """Train to the end, or until the last rank ends itself in front of an update."""
    trainer = make(folder, plain)

    def open_loader(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start, GLOBAL_BATCH, rank, world_size), start):
            if step == kill_at and rank == world_size - 1:
                os._exit(LOST)
            pixels = batch.images_BCHW.flatten(1).double().sum(dim=1).tolist()
            entry = {"step": step, "labels": batch.labels_B.tolist(), "pixels": pixels}
            write(folder / f"batches-{rank}-of-{world_size}", entry)
            yield batch

    described, diary = record(CONFIG, "v2"), Diary(folder / "diary")
    train(trainer, open_loader, diary, folder / "checkpoints", folder / "v2", described, TABLE, folder / "incidents")


def everything(_rank: int, _world_size: int, folder: Path) -> tuple[int, dict[str, Tensor]]:
    """All that the last checkpoint holds, on one rank."""
    trainer = make(folder, plain=False)
    step = trainer.restore(folder / "checkpoints")
    flat = {name: tensor for part in trainer._state().values() for name, tensor in part.items()}
    return step, {name: _whole(tensor).clone() for name, tensor in flat.items()}


def _whole(tensor: Tensor) -> Tensor:
    return (
        torch.cat(cast(LocalShardsWrapper, tensor.to_local()).local_shards()) if isinstance(tensor, DTensor) else tensor
    )


def global_batches(folder: Path, world_size: int) -> dict[int, tuple[list[int], list[float]]]:
    """Labels and pixels of each step that so many ranks took, over the ranks."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    files = [folder / f"batches-{rank}-of-{world_size}" for rank in range(world_size)]
    by_rank = [{entry["step"]: entry for entry in read(path)} for path in files]
    for step in by_rank[0].keys() & by_rank[-1].keys():
        parts = [entries[step] for entries in by_rank]
        labels, pixels = ([value for part in parts for value in part[key]] for key in ("labels", "pixels"))
        found[step] = labels, pixels
    return found


def told(folder: Path) -> dict[int, dict[str, float]]:
    """Figures by step; a step that was told again was told the same."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in read(folder / "diary"):
        assert by_step.setdefault(entry["step"], entry) == entry, "told twice, and otherwise"
    return by_step


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, make_parent, str(folder))
    run_ranks(2, run, folder, False, None)
    return folder


def test_killed_at_several_steps_equals_never_killed_bit_by_bit(never_killed: Path, tmp_path: Path) -> None:
    run_ranks(1, make_parent, str(tmp_path))
    for kill_at in (2, EVERY, 2 * EVERY + 1):  # before the first checkpoint, while it is written, later
        lose_ranks(2, run, tmp_path, False, kill_at)
    assert len(read(tmp_path / "diary")) > STEPS - 1, "steps were told again"
    run_ranks(2, run, tmp_path, False, None)
    assert told(tmp_path) == told(never_killed)
    assert list(told(tmp_path)) == list(range(1, STEPS + 1))
    assert global_batches(tmp_path, 2) == global_batches(never_killed, 2)
    (got_step, got), (expected_step, expected) = (
        run_ranks(1, everything, folder)[0] for folder in (tmp_path, never_killed)
    )
    assert got_step == expected_step == STEPS
    assert {name.split(".")[0] for name in expected} >= {"weight", "optimiser", "buffer", "exp_avg", "steps"}
    for one, other in ((got, expected), (tensors(tmp_path / "v2"), tensors(never_killed / "v2"))):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(value, one[name]), name


def test_at_another_world_size_the_batches_are_the_same_and_losses_nearly(tmp_path: Path) -> None:
    """With a backbone whose features do not depend on how a batch is cut: no batch norm, no dropout."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run_ranks(2, run, whole, True, None)
    lose_ranks(2, run, cut, True, 2 * EVERY + 1)
    before = len(read(cut / "diary"))
    run_ranks(3, run, cut, True, None)
    expected, got = told(whole), {entry["step"]: entry for entry in read(cut / "diary")}
    assert before == 2 * EVERY + 1
    assert got.keys() == expected.keys()
    for step, figures in expected.items():
        assert got[step] == pytest.approx(figures, rel=1e-5)
    batches_of_all = global_batches(whole, 2)
    assert batches_of_all.keys() == set(range(STEPS))
    for world_size, steps in ((2, range(2 * EVERY + 1)), (3, range(2 * EVERY, STEPS))):
        taken = global_batches(cut, world_size)
        assert taken.keys() >= set(steps)
        assert all(batches_of_all[step] == batch for step, batch in taken.items())
    assert min(taken) >= EVERY, "resumed, not begun anew"
