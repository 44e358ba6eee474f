"""One update, however it is computed: in micro-batches, clipped, tile by tile, by sampled prototypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.compat.methods.bct import Bct
from pipeline.errors import ConfigError
from pipeline.identities import IdentityTable
from pipeline.model import rows as model_rows
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.implementations import blocked
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts
from pipeline.model.sampling import most_sampled, sampled
from pipeline.training import trainer as trainer_module
from pipeline.training.engine import EngineConfig
from pipeline.training.optimiser import OptimiserConfig, learning_rate
from pipeline.training.row_optimiser import RowOptimiser
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.dense import dense_loss, influence_loss
from tests.distributed.ranks import run_ranks

MARGIN = MarginConfig(name="cosface", scale=10.0, m3=0.1)
BACKBONE = BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4)
TABLE = IdentityTable(tuple(f"id{row:02d}" for row in range(11)))
OLD_ROWS = torch.tensor([2, 3, 7, 9])  # identities that the parent knew
BATCH, STEPS, WEIGHT = 13, 3, 0.5


def plain_backbone() -> nn.Module:
    """Without batch norm, whose statistics are those of the micro-batch."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def old_prototypes() -> Tensor:
    return torch.randn(len(OLD_ROWS), 6, generator=torch.Generator().manual_seed(9))


def drawn(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 3, 4, generator=generator), torch.randint(len(TABLE), (BATCH,), generator=generator)


def make_trainer(training: dict[str, Any], classifier: dict[str, Any] | None = None, parent: bool = True) -> Trainer:
    """A trainer with a plain backbone and a parent that is held in memory."""
    trainer_module.build_backbone = lambda _: plain_backbone()  # type: ignore
    config = TrainingConfig.model_validate({"steps": STEPS, "global_batch": BATCH, **training})
    settings = ClassifierConfig.model_validate(classifier or {})
    trainer = Trainer(
        "v2", TABLE, [], BACKBONE, MARGIN, Bct(weight=WEIGHT), config, settings, "digest", 3, torch.device("cpu")
    )
    if parent:
        inside = (trainer.classifier.first_row <= OLD_ROWS) & (trainer.classifier.end_row > OLD_ROWS)
        trainer.classifier.parents = (Head("v1", old_prototypes()[inside], OLD_ROWS[inside], MARGIN),)
    return trainer


def updates(rank: int, world_size: int, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Weights, losses and norms of each run's updates."""
    blocked.TILE_ROWS = 3
    out = []
    for training, classifier in runs:
        trainer, seen = make_trainer(training, classifier), []
        parts = batch_parts(BATCH, world_size)
        mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        for step in range(STEPS):
            images, labels = drawn(step)
            losses, norms = trainer.step(images[mine], labels[mine], step)
            seen.append({"losses": losses.tolist(), **norms})
        state = trainer.engine.state()
        backbone = torch.cat([state[name].flatten() for name in state if name.startswith("weight.")])
        rows = trainer.classifier.weight_CD.tolist() if trainer.mesh.replica == 0 else []
        out.append({"backbone": backbone.tolist(), "rows": rows, "seen": seen, "fused": trainer.fused})
    return out


def dense_updates(optimiser: OptimiserConfig) -> dict[str, Any]:
    """The same in one process with torch's own optimisers, on the whole batch at once, in float64."""
    backbone = plain_backbone().double()
    weight = model_rows.initial_rows(0, len(TABLE), 6, 3).double().requires_grad_()
    parameters = list(backbone.parameters())
    old, seen = old_prototypes().double(), []
    groups: list[dict[str, Any]] = [
        {"params": [p], "weight_decay": optimiser.weight_decay * (p.ndim > 1)} for p in parameters
    ]
    groups.append({"params": [weight], "weight_decay": optimiser.classifier_weight_decay})
    torch_optimiser: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if optimiser.name == "adamw" else torch.optim.SGD(groups, momentum=optimiser.momentum)
    )
    for step in range(STEPS):
        images, labels = drawn(step)
        old_labels = torch.tensor([OLD_ROWS.tolist().index(row) if row in OLD_ROWS else -1 for row in labels])
        torch_optimiser.zero_grad()
        features = backbone(images.double())
        losses = [dense_loss(features, weight, labels, MARGIN), influence_loss(features, old, old_labels, MARGIN, 6)]
        (losses[0] + WEIGHT * losses[1]).backward()
        norm = nn.utils.clip_grad_norm_(parameters, optimiser.clip or math.inf)
        row_norm = nn.utils.clip_grad_norm_([weight], optimiser.classifier_clip or math.inf)
        seen.append({"losses": [loss.item() for loss in losses], "backbone": norm.item(), "rows": row_norm.item()})
        for group in torch_optimiser.param_groups:
            group["lr"] = learning_rate(optimiser, step, STEPS)
        torch_optimiser.step()
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return {"backbone": flat, "rows": weight.detach(), "seen": seen}


SGD: dict[str, Any] = {"name": "sgd", "learning_rate": 0.5, "weight_decay": 0.01, "classifier_weight_decay": 0.02}
ADAMW: dict[str, Any] = {"name": "adamw", "learning_rate": 0.01, "classifier_weight_decay": 0.1}
CLIPPED = {**SGD, "clip": 0.3, "classifier_clip": 0.2}


def check(results: list[list[dict[str, Any]]], run: int, expected: dict[str, Any]) -> None:
    rows = torch.tensor([row for result in results for row in result[run]["rows"]], dtype=torch.float64)
    torch.testing.assert_close(rows, expected["rows"], rtol=1e-4, atol=2e-6)
    for result in results:
        backbone = torch.tensor(result[run]["backbone"], dtype=torch.float64)
        torch.testing.assert_close(backbone, expected["backbone"], rtol=1e-4, atol=2e-6)
        for seen, wanted in zip(result[run]["seen"], expected["seen"], strict=True):
            assert seen["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
            assert seen["grad_norm/backbone"] == pytest.approx(wanted["backbone"], rel=1e-4)
            if "grad_norm/classifier" in seen:
                assert seen["grad_norm/classifier"] == pytest.approx(wanted["rows"], rel=1e-4)


@pytest.mark.parametrize("optimiser", [SGD, ADAMW, CLIPPED], ids=["sgd", "adamw", "clipped"])
def test_micro_batches_clipping_and_tiles_give_the_update_of_one_large_batch(optimiser: dict[str, Any]) -> None:
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for stage in (0, 1, 2, 3):
        for accumulation in (1, 3):
            engine = {"zero_stage": stage}
            runs.append(({"optimiser": optimiser, "engine": engine, "accumulation": accumulation}, {}))
    runs.append(({"optimiser": optimiser}, {"fused_update": False}))
    runs.append(({"optimiser": optimiser, "accumulation": 2}, {"shard_ranks": 1}))
    results = run_ranks(2, updates, runs)
    expected = dense_updates(OptimiserConfig.model_validate(optimiser))
    if optimiser is CLIPPED:
        assert min(seen["backbone"] for seen in expected["seen"]) > 0.3, "the test clips"
        assert min(seen["rows"] for seen in expected["seen"]) > 0.2, "the test clips"
        assert all("grad_norm/classifier" in seen for seen in results[0][0]["seen"])
    assert [run["fused"] for run in results[0]] == [optimiser is not CLIPPED and n in (0, 2, 4, 6) for n in range(10)]
    for run in range(len(runs)):
        check(results, run, expected)


def broken_in_second_micro_batch(_rank: int, _world_size: int) -> list[Any]:
    out: list[Any] = []
    for stage in (0, 1, 2, 3):
        trainer = make_trainer({"optimiser": SGD, "accumulation": 3, "engine": {"zero_stage": stage}})
        images, labels = drawn(0)
        trainer.step(images, labels, 0)
        before = {name: value.clone() for name, value in trainer.engine.state().items()}
        rows = trainer.classifier.weight_CD.clone()
        broken = images.clone()
        broken[6] = torch.nan
        losses, norms = trainer.step(broken, labels, 1)
        same = all(torch.equal(value, before[name]) for name, value in trainer.engine.state().items())
        out.append((bool(losses.isfinite().all()), norms, same, torch.equal(rows, trainer.classifier.weight_CD)))
        trainer.step(images, labels, 1)
        other = make_trainer({"optimiser": SGD, "accumulation": 3, "engine": {"zero_stage": stage}})
        other.step(images, labels, 0)
        other.step(images, labels, 1)
        after, wanted = trainer.engine.state(), other.engine.state()
        assert all(torch.equal(value, wanted[name]) for name, value in after.items()), "nothing of it is left"
        assert torch.equal(trainer.classifier.weight_CD, other.classifier.weight_CD)
    return out


def test_micro_batch_without_a_finite_loss_moves_nobody() -> None:
    assert run_ranks(1, broken_in_second_micro_batch) == [[(False, {}, True, True)] * 4]


def refusals(_rank: int, _world_size: int) -> list[str]:
    out = []
    for training, classifier in (
        ({"optimiser": CLIPPED}, {"fused_update": True}),
        ({"accumulation": 2}, {"fused_update": True}),
        ({}, {"fused_update": True, "shard_ranks": 1}),
        ({"accumulation": 7}, {}),
        ({}, {"precision": "bf16"}),
    ):
        with pytest.raises(ConfigError) as error:
            make_trainer(training, classifier, parent=False)
        out.append(str(error.value))
    return out


def test_settings_that_exclude_each_other_are_refused_in_one_line() -> None:
    told = run_ranks(2, refusals)[0]
    assert "classifier_clip needs the whole" in told[0]
    assert "accumulation above 1 needs the whole" in told[1]
    assert "shard_ranks below the number of processes needs the whole" in told[2]
    assert "leaves nothing for some of 2 processes in 7 micro-batches" in told[3]
    assert "bf16" in told[4]
    assert not any("\n" in line for line in told)


# Sampling


RATE, SEED = 0.4, 3


def sampled_steps(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses of three sampled updates, what stood still, and the rows at the end."""
    out = []
    for config in runs:
        trainer = make_trainer(
            {"optimiser": config.pop("optimiser"), "accumulation": config.pop("accumulation", 1)}, config
        )
        parts = batch_parts(BATCH, world_size)
        mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        seen = []
        for step in range(STEPS):
            before = trainer.classifier.weight_CD.clone()
            slots = {name: slot.clone() for name, slot in trainer.row_optimiser.slots.items()}
            images, labels = drawn(step)
            losses, _ = trainer.step(images[mine], labels[mine] % 5, step)
            moved = (trainer.classifier.weight_CD != before).any(dim=1)
            for name, slot in trainer.row_optimiser.slots.items():
                assert torch.equal((slot != slots[name]).any(dim=1) | moved, moved), f"{name} of a row that stood still"
            seen.append(
                {
                    "losses": losses.tolist(),
                    "moved": (moved.nonzero().flatten() + trainer.classifier.first_row).tolist(),
                }
            )
        rows = trainer.classifier.weight_CD.tolist() if trainer.mesh.replica == 0 else []
        out.append({"seen": seen, "rows": rows, "first": trainer.mesh.replica == 0})
    return out


def taking_part(step: int) -> list[int]:
    chosen = sampled(torch.arange(len(TABLE)), RATE, SEED, step)
    chosen[drawn(step)[1] % 5] = True
    return chosen.nonzero().flatten().tolist()


@pytest.mark.parametrize("optimiser", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_sampling_takes_and_moves_the_same_rows_at_every_world_size(optimiser: dict[str, Any]) -> None:
    base = {"optimiser": optimiser, "sample_rate": RATE}
    runs = [
        {**base},
        {**base, "accumulation": 2},
        {**base, "fused_update": False},
        {**base, "implementation": "dense"},
        {**base, "shard_ranks": 1},
    ]
    by_world = [run_ranks(world_size, sampled_steps, runs) for world_size in (1, 2, 3)]
    expected = torch.tensor(by_world[0][0][0]["rows"])
    assert len(taking_part(0)) < len(TABLE), "some rows are left out"
    for results in by_world:
        for run in range(len(runs)):
            for step in range(STEPS):
                moved = sorted({row for result in results for row in result[run]["seen"][step]["moved"]})
                assert moved == taking_part(step)
                for result in results:
                    wanted = by_world[0][0][0]["seen"][step]["losses"]
                    assert result[run]["seen"][step]["losses"] == pytest.approx(wanted, rel=1e-5)
            rows = torch.tensor([row for result in results for row in result[run]["rows"]])
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=2e-6)


def test_sampled_loss_is_that_of_the_rows_that_take_part() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(TABLE), (5,), generator=generator)
    for parents_too in (False, True):
        config = ClassifierConfig(sample_rate=RATE, sample_parents=parents_too)
        parent = Head("v1", old_prototypes(), OLD_ROWS, MARGIN)
        classifier = ShardedClassifier("v2", len(TABLE), 6, MARGIN, [parent], seed=SEED, config=config)
        features = torch.randn(5, 6, generator=generator)
        losses = classifier(features.clone().requires_grad_(), labels, [5], step=7)
        chosen = sampled(torch.arange(len(TABLE)), RATE, SEED, 7)
        chosen[labels] = True
        kept = chosen.nonzero().flatten()
        places = torch.searchsorted(kept, labels)
        wanted = [dense_loss(features, classifier.weight_CD[kept], places, MARGIN)]
        old = OLD_ROWS[chosen[OLD_ROWS]] if parents_too else OLD_ROWS
        old_weight = old_prototypes()[torch.isin(OLD_ROWS, old)]
        old_labels = torch.tensor([old.tolist().index(row) if row in OLD_ROWS else -1 for row in labels])
        wanted.append(influence_loss(features, old_weight, old_labels, MARGIN, 6))
        torch.testing.assert_close(losses.detach(), torch.stack(wanted))


def test_sampling_is_uniform_without_state_and_within_its_bound() -> None:
    rows, rate = torch.arange(200_000), 0.1
    first, second = sampled(rows, rate, 0, 1), sampled(rows, rate, 0, 2)
    assert torch.equal(first[1234:5678], sampled(rows[1234:5678], rate, 0, 1)), "a row's choice is its own"
    for chosen in (first, second, sampled(rows, rate, 1, 1)):
        assert abs(int(chosen.sum()) - 20_000) < 4 * math.sqrt(200_000 * 0.09)
        assert int(chosen.sum()) <= most_sampled(len(rows), rate)
    both = int((first & second).sum())
    assert abs(both - 2_000) < 4 * math.sqrt(2_000), "steps are independent"
    assert sampled(rows, 1.0, 0, 0).all()


def test_rows_sampled_at_every_step_see_torchs_own_optimisers() -> None:
    for settings in (SGD, ADAMW):
        config = OptimiserConfig.model_validate(settings)
        weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        reference = weight[[1, 4, 7]].double().requires_grad_()
        rows, decay = RowOptimiser(weight, config), config.classifier_weight_decay
        torch_optimiser = (
            torch.optim.AdamW([reference], lr=0.1, weight_decay=decay)
            if config.name == "adamw"
            else torch.optim.SGD([reference], lr=0.1, momentum=0.9, weight_decay=decay)
        )
        for step in range(5):
            gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            reference.grad = gradient.double()
            torch_optimiser.step()
            rows.step(torch.tensor([1, 4, 7]), gradient.clone(), 0.1)
        torch.testing.assert_close(weight[[1, 4, 7]].double(), reference.detach(), rtol=1e-5, atol=1e-6)


def group_of_two_ranks(rank: int, world_size: int) -> float:
    """A step whose group's ranks have unequal parts of the batch."""
    classifier = ShardedClassifier("new", 11, 4, MARGIN, mesh=ClassMesh.of_world("cpu", 2))
    parts = [3, 1, 2, 2]
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert world_size == 4
    return float(classifier(features[mine].requires_grad_(), torch.arange(8)[mine], parts)[0])


def test_groups_with_unequal_parts_agree_on_the_loss() -> None:
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    wanted = dense_loss(features, model_rows.initial_rows(0, 11, 4, 0), torch.arange(8), MARGIN).item()
    assert run_ranks(4, group_of_two_ranks) == pytest.approx([wanted] * 4, rel=1e-6)


def test_engine_config_defaults_stay_plain() -> None:
    assert EngineConfig().zero_stage == 1
