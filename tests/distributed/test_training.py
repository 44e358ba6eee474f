"""Training on real ranks: the engine's gradients, resuming, and the artefact at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.compat.methods.bct import Bct
from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import TrainingError
from pipeline.generation import Generation, GenerationRecord
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts, initial_rows
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.engine import BackboneEngine, EngineConfig
from pipeline.training.guards import GuardConfig
from pipeline.training.loop import train
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.dense import dense_loss
from tests.distributed.ranks import run_ranks

MARGIN = MarginConfig(name="cosface", scale=10.0, m3=0.1)
BACKBONE = BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4, dropout=0.1)
TABLE = IdentityTable(tuple(f"id{row}" for row in range(11)))
SGD = OptimiserConfig(name="sgd", learning_rate=0.05, weight_decay=0.01, warmup=0.0)


@dataclass
class Batch:
    images_BCHW: Tensor
    labels_B: Tensor
    number: int = 0

    def keys(self) -> list[str]:
        return [f"{self.number}/{place}" for place in range(len(self.labels_B))]


@dataclass
class Notes:
    seen: list[tuple[int, dict[str, float]]]

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.seen.append((step, metrics))


def batches(start: int, global_batch: int, rank: int, world_size: int, poison: int | None = None) -> Iterator[Batch]:
    """Batch t as a pure function of t, cut for the rank."""
    parts = batch_parts(global_batch, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(global_batch, 1, 8, 8, generator=generator)
        labels = torch.randint(len(TABLE), (global_batch,), generator=generator)
        if poison is not None and step >= poison:
            images[0] = torch.nan
        yield Batch(images[mine], labels[mine], step)
        step += 1


def record(config: TrainingConfig, name: str = "v1") -> GenerationRecord:
    return GenerationRecord(
        family="test",
        name=name,
        backbone=BACKBONE,
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=MARGIN,
        identities=len(TABLE),
        config=config.model_dump(),
        config_digest="c",
        data_digest="d",
        code_version="test",
    )


def all_stages(rank: int, world_size: int, optimiser: OptimiserConfig) -> dict[int, list[float]]:
    return {stage: engine_steps(rank, world_size, stage, optimiser) for stage in (0, 1, 2, 3)}


def engine_steps(rank: int, world_size: int, stage: int, optimiser: OptimiserConfig) -> list[float]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    engine = BackboneEngine(backbone, optimiser, EngineConfig(zero_stage=stage), 6)
    classifier = ShardedClassifier("new", len(TABLE), 4, MARGIN, mesh=ClassMesh.of_world("cpu"))
    parts = batch_parts(7, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    for step in range(4):
        torch.manual_seed(step)
        images, labels = torch.randn(7, 5), torch.randint(len(TABLE), (7,))
        features, _ = engine.features(images[mine], images.new_zeros(len(images[mine]), 0), labels[mine])
        engine.backward(classifier(features, labels[mine], parts).sum(), last=True)
        engine.step(0.05)
    state = engine.state()
    names = [name for name in state if name.startswith("weight.")]
    return torch.cat([state[name].flatten() for name in names]).tolist()


def dense_steps(optimiser: OptimiserConfig) -> list[float]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    weight = initial_rows(0, len(TABLE), 4, 0)
    decay = [{"params": [p], "weight_decay": optimiser.weight_decay * (p.ndim > 1)} for p in backbone.parameters()]
    torch_optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(decay, lr=0.05, momentum=0.9) if optimiser.name == "sgd" else torch.optim.AdamW(decay, lr=0.05)
    )
    for step in range(4):
        torch.manual_seed(step)
        images, labels = torch.randn(7, 5), torch.randint(len(TABLE), (7,))
        torch_optimiser.zero_grad()
        dense_loss(backbone(images), weight, labels, MARGIN).backward()
        torch_optimiser.step()
    return torch.cat([parameter.detach().flatten() for parameter in backbone.parameters()]).tolist()


@pytest.mark.parametrize("optimiser", [SGD, OptimiserConfig(weight_decay=0.1)], ids=lambda config: config.name)
def test_backbone_moves_as_in_one_process_at_every_zero_stage(optimiser: OptimiserConfig) -> None:
    expected = torch.tensor(dense_steps(optimiser))
    for result in run_ranks(3, all_stages, optimiser):
        for stage, weights in result.items():
            torch.testing.assert_close(
                torch.tensor(weights), expected, rtol=2e-4, atol=2e-6, msg=f"ZeRO {stage} differs from one process"
            )


def run_training(
    rank: int, world_size: int, folder: str, config: TrainingConfig, stop_after: int | None, poison: int | None
) -> list[tuple[int, dict[str, float]]]:
    """Train to the end, or be cut off in front of step `stop_after`."""
    home = Path(folder)
    arguments = (
        TABLE,
        _parents(home),
        BACKBONE,
        MARGIN,
        Bct(weight=0.5),
        config,
        ClassifierConfig(),
        "digest",
        3,
    )
    trainer = Trainer("v2", *arguments, device=torch.device("cpu"))
    notes = Notes([])

    def open_loader(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start, config.global_batch, rank, world_size, poison), start):
            if step == stop_after:
                raise KeyboardInterrupt
            yield batch

    try:
        places = home / "checkpoints", home / "v2"
        train(trainer, open_loader, notes, *places, record(config, "v2"), TABLE, home / "incidents")
    except KeyboardInterrupt:
        assert stop_after is not None
    return notes.seen


def _parents(home: Path) -> list[Generation]:
    return [Generation(home / "parent")] if (home / "parent").exists() else []


def make_parent(rank: int, world_size: int, folder: str) -> None:
    """A trained generation over another table: not a prefix, another order, one identity gone."""
    table = IdentityTable(("id7", "gone", "id2", "id9"))
    config = TrainingConfig(steps=2, global_batch=6, optimiser=SGD, engine=EngineConfig(zero_stage=0))
    arguments = (BACKBONE, MARGIN, Bct(), config, ClassifierConfig(), "digest", 1)
    trainer = Trainer("v1", table, [], *arguments, device=torch.device("cpu"))
    labelled = (Batch(b.images_BCHW, b.labels_B % 4) for b in batches(0, 6, rank, world_size))
    home = Path(folder)
    described = record(config).model_copy(update={"identities": len(table)})
    places = home / "parent-checkpoints", home / "parent"
    train(trainer, lambda _: labelled, Notes([]), *places, described, table, home / "parent-incidents")


def tensors(path: Path) -> dict[str, Tensor]:
    generation = Generation(path)
    generation.verify()
    everything = {"backbone." + name: value for name, value in load_file(path / "backbone.safetensors").items()}
    import numpy as np

    everything["rows"] = generation.read_classifier_rows(np.arange(generation.record.identities))
    return everything


CONFIG = TrainingConfig(
    steps=7,
    global_batch=9,
    checkpoints=CheckpointConfig(every=3),
    log_every=1,
    optimiser=OptimiserConfig(learning_rate=0.01),
)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_interrupted_equals_uninterrupted(tmp_path: Path, stage: int) -> None:
    config = CONFIG.model_copy(update={"engine": EngineConfig(zero_stage=stage)})
    run_ranks(1, make_parent, str(tmp_path / "a"))
    run_ranks(1, make_parent, str(tmp_path / "b"))
    whole = run_ranks(2, run_training, str(tmp_path / "a"), config, None, None)[0]
    first = run_ranks(2, run_training, str(tmp_path / "b"), config, 5, None)[0]
    second = run_ranks(2, run_training, str(tmp_path / "b"), config, None, None)[0]
    assert [step for step, _ in first] == [1, 2, 3, 4, 5]
    assert [step for step, _ in second] == [4, 5, 6, 7], "resumes after the checkpoint of step 3"
    losses = {step: (figures["loss/v2"], figures["loss/v1"]) for step, figures in whole}
    assert losses == {step: (figures["loss/v2"], figures["loss/v1"]) for step, figures in first[:3] + second}
    expected, got = tensors(tmp_path / "a" / "v2"), tensors(tmp_path / "b" / "v2")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_checkpoint_of_two_ranks_resumes_on_three(tmp_path: Path) -> None:
    run_ranks(2, run_training, str(tmp_path), CONFIG, 5, None)
    seen = run_ranks(3, run_training, str(tmp_path), CONFIG, None, None)[0]
    assert [step for step, _ in seen] == [4, 5, 6, 7]
    generation = Generation(tmp_path / "v2")
    generation.verify()
    assert generation.reproduce_selftest() > 0.9999


def rows_after_resume(_rank: int, _world_size: int, folder: str) -> Any:
    parents: list[Generation] = []
    arguments = (TABLE, parents, BACKBONE, MARGIN, Bct(), CONFIG, ClassifierConfig(), "digest", 3)
    trainer = Trainer("v2", *arguments, device=torch.device("cpu"))
    step = trainer.restore(Path(folder) / "checkpoints")
    slots = trainer.row_optimiser.slots
    return step, trainer.classifier.weight_CD.tolist(), slots["exp_avg"].tolist(), slots["steps"].tolist()


def test_rows_and_moments_are_the_same_at_every_world_size(tmp_path: Path) -> None:
    run_ranks(2, run_training, str(tmp_path), CONFIG, 5, None)
    per_world: list[tuple[Any, ...]] = []
    for world_size in (1, 2, 3, 4):
        results = run_ranks(world_size, rows_after_resume, str(tmp_path))
        assert {result[0] for result in results} == {3}
        per_world.append(tuple([row for result in results for row in result[part]] for part in (1, 2, 3)))
    assert all(result == per_world[0] for result in per_world)
    assert per_world[0][2] == [[3.0]] * len(TABLE)


def test_loss_that_is_no_number_moves_nobody_and_ends_the_run(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"guards": GuardConfig(nonfinite_limit=2)})
    told = "loss or gradient is not a number at step 6 and 2 times before.* it goes on from step 6"
    with pytest.raises(AssertionError, match=told):
        run_ranks(2, run_training, str(tmp_path), config, None, 4)
    assert TrainingError.exit_code != 0
