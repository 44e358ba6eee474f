"""Each method on real parents: what its losses are, at any number of ranks, and after an interruption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import generation
from pipeline.compat.methods.bct import Bct
from pipeline.errors import ConfigError
from pipeline.generation import Generation
from pipeline.model.rows import batch_parts, initial_rows
from pipeline.training.optimiser import learning_rate
from tests import dense
from tests.distributed.ranks import run_ranks
from tests.distributed.small_parents import (
    BATCH,
    CASES,
    MARGIN,
    OLD_TABLES,
    SEED,
    STEPS,
    TABLE,
    PlainParent,
    backbone_config,
    compat,
    drawn,
    make_parent,
    make_trainer,
    plain,
    plain_losses,
    use_plain_backbones,
)


def wanted_losses(home: Path, case: tuple[dict[str, Any], list[str], int], step: int) -> dict[str, float]:
    """Of the first weights, on the batch of a step."""
    (settings, parents, dim), (images, labels) = case, drawn(step)
    torch.manual_seed(SEED)
    network = plain(backbone_config(dim)).double()
    if settings["method"] == "finetune":
        network = Generation(home / parents[0]).load_backbone().double()
    features = network(images.double())
    losses = {"v2": dense.dense_loss(features, initial_rows(0, len(TABLE), dim, SEED).double(), labels, MARGIN)}
    for name in parents:
        losses |= plain_losses(PlainParent(home, name), compat(settings), features, images, labels)
    return {name: loss.item() for name, loss in losses.items()}


def first_losses(_rank: int, _world_size: int, home: Path) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Losses of each case's first step, and the plain ones."""
    use_plain_backbones()
    for name in OLD_TABLES:
        make_parent(home, name)
    out = []
    for case in CASES:
        trainer = make_trainer(home, *case)
        losses, _ = trainer.step(*drawn(0), 0)
        out.append((dict(zip(trainer.loss_names, losses.tolist(), strict=True)), wanted_losses(home, case, 0)))
    return out


def several_steps(rank: int, world_size: int, home: Path) -> list[list[list[float]]]:
    """Losses of each case's steps."""
    use_plain_backbones()
    parts = batch_parts(BATCH, world_size)
    mine, out = slice(sum(parts[:rank]), sum(parts[: rank + 1])), []
    for case in CASES:
        trainer = make_trainer(home, *case)
        batches = [drawn(step) for step in range(STEPS)]
        steps = [trainer.step(images[mine], labels[mine], n)[0] for n, (images, labels) in enumerate(batches)]
        out.append(torch.stack(steps).tolist())
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def of_one(rank: int, world_size: int, home: Path) -> dict[str, Any]:
    """All that one process tells; it also makes the parents."""
    told: dict[str, Any] = {"first": first_losses(rank, world_size, home)}
    told |= {"steps": several_steps(rank, world_size, home), "far": updates(home), "refused": refused(home)}
    return told


def of_two(rank: int, world_size: int, home: Path) -> dict[str, Any]:
    """All that each of two processes tells."""
    return {"steps": several_steps(rank, world_size, home), "same": interrupted(rank, world_size, home)}


@pytest.fixture(scope="module")
def one(home: Path) -> dict[str, Any]:
    told: dict[str, Any] = run_ranks(1, of_one, home)[0]
    return told


@pytest.fixture(scope="module")
def two(one: dict[str, Any], home: Path) -> list[dict[str, Any]]:
    assert one, "the parents are there"
    return run_ranks(2, of_two, home)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{case[0]['method']}" for n, case in enumerate(CASES)])
def test_a_steps_losses_are_the_plain_ones(one: dict[str, Any], number: int) -> None:
    told, wanted = one["first"][number]
    assert list(told) == list(wanted)
    assert told == pytest.approx(wanted, rel=1e-5)
    assert min(told.values()) > 0


def test_two_ranks_lose_what_one_does(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["steps"] == two[1]["steps"]
    for alone, together in zip(one["steps"], two[0]["steps"], strict=True):
        for losses, wanted in zip(together, alone, strict=True):
            assert losses == pytest.approx(wanted, rel=1e-4)


def interrupted(rank: int, world_size: int, home: Path) -> list[list[bool]]:
    """Whether losses and weights after an interruption are those without one, bit for bit, by case."""
    use_plain_backbones()
    parts = batch_parts(BATCH, world_size)
    mine, out = slice(sum(parts[:rank]), sum(parts[: rank + 1])), []
    means = {"method": "bct", "prototypes": "means"}
    for settings in ({"method": "bct-sys"}, {"method": "bct-kd"}, means, {"method": "live"}):
        folder = home / f"checkpoints-{settings['method']}"  # one a case: a run has its own
        whole, before, after = (make_trainer(home, settings, ["v1", "v0"], 8) for _ in range(3))
        images, labels = zip(*((part[mine] for part in drawn(step)) for step in range(STEPS)), strict=True)
        wanted = [whole.step(images[step], labels[step], step)[0] for step in range(STEPS)]
        told = [before.step(images[step], labels[step], step)[0] for step in range(2)]
        before.save(folder, 2)
        before.checkpoints.join()
        assert after.restore(folder) == 2
        told.append(after.step(images[2], labels[2], 2)[0])
        got, state = after.engine.state(), whole.engine.state()
        same = [torch.equal(one, two) for one, two in zip(told, wanted, strict=True)]
        same += [torch.equal(got[name], value) for name, value in state.items()]
        heads = zip(after.classifier.heads, whole.classifier.heads, strict=True)
        out.append([*same, *(torch.equal(one.weight_CD, two.weight_CD) for one, two in heads)])
    return out


def test_interrupted_equals_uninterrupted(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert [all(same) for same in result["same"]] == [True] * 4
        assert all(len(same) > STEPS + 4 for same in result["same"]), "weights and their optimiser's state"


def synthesised(_rank: int, _world_size: int, home: Path) -> list[tuple[list[list[float]], list[int]]]:
    """This rank's part of a parent's head with synthesised prototypes, without a bound and with one."""
    use_plain_backbones()
    out = []
    for confidence in (0.0, 0.9):
        trainer = make_trainer(home, {"method": "bct-sys", "confidence": confidence}, ["v1"], 6)
        (head,) = trainer.classifier.parents
        assert isinstance(head.rows_C, Tensor)
        assert (head.rows_C.diff() > 0).all(), "ascending, none twice"
        out.append((head.weight_CD.tolist(), head.rows_C.tolist()))
    return out


@pytest.mark.usefixtures("one")
def test_synthesised_prototypes_are_confident_class_means_of_the_others_length(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "build_backbone", plain)
    results = run_ranks(3, synthesised, home)
    parent, found = PlainParent(home, "v1"), []
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-6)
    for number, confidence in enumerate((0.0, 0.9)):
        rows = [row for result in results for row in result[number][1]]
        weight = torch.tensor([one for result in results for one in result[number][0]], dtype=torch.float64)
        assert len(set(rows)) == len(rows)
        wanted, column_of = parent.synthesised(confidence)
        inside = [place for place, row in enumerate(rows) if row < len(TABLE)]
        assert sorted(rows[place] for place in inside) == sorted(column_of)
        close(weight[inside], wanted[[column_of[rows[place]] for place in inside]])
        new = [place for place in inside if TABLE.keys[rows[place]] not in parent.table.row_of_key]
        length = parent.weight.norm(dim=1).mean()
        close(weight[new].norm(dim=1), length.expand(len(new)))
        found.append(set(rows))
    assert 10 not in found[0], "no image, no prototype"
    assert 4 in found[1], "one image: its mean has length 1"
    assert found[1] < found[0], "some means are too short"


def updates(home: Path) -> list[float]:
    """How far weights are, by their size, from plain descent on L_new + lambda L_old after each step, lambda moving."""
    use_plain_backbones()
    settings = {"method": "bct", "weight": 0.4, "weight_end": 1.6, "warmup": 0.5}
    trainer, parent, far = make_trainer(home, settings, ["v1"], 6), PlainParent(home, "v1"), []
    torch.manual_seed(SEED)
    network, rows = plain(backbone_config(6)).double(), initial_rows(0, len(TABLE), 6, SEED).double().requires_grad_()
    for step, weight in enumerate((0.4 * 1 / 1.5, 1.0, 1.6)):
        images, labels = drawn(step)
        features = network(images.double())
        old = dense.influence_loss(features, parent.weight, parent.columns(labels), parent.margin, 6)
        total = dense.dense_loss(features, rows, labels, MARGIN) + weight * old
        parameters = [*network.parameters(), rows]
        gradients = torch.autograd.grad(total, parameters)
        rate = learning_rate(trainer.config.optimiser, step, STEPS)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data.sub_(gradient, alpha=rate)
        trainer.step(images, labels, step)
        weights = [value for name, value in trainer.engine.state().items() if name.startswith("weight.")]
        pairs = zip([*weights, trainer.classifier.weight_CD], parameters, strict=True)
        far.append(max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs))
    return far


def test_lambdas_schedule_reaches_the_update(one: dict[str, Any]) -> None:
    assert len(one["far"]) == STEPS
    assert max(one["far"]) < 5e-6


def test_lambda_moves_linearly_after_its_warmup() -> None:
    assert [Bct(weight=0.5).weight_at(step, 4) for step in range(4)] == [0.5] * 4
    moving = Bct(weight=1.0, weight_end=0.0)
    assert [moving.weight_at(step, 5) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    warming = Bct(weight=2.0, warmup=0.4)
    assert [warming.weight_at(step, 10) for step in range(6)] == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    assert Bct(weight=3.0, weight_end=1.0).weight_at(0, 1) == 3.0


def refused(home: Path) -> str:
    """What is said of a backbone that cannot start from the parent's; dropout may differ."""
    use_plain_backbones()
    with pytest.raises(ConfigError) as error:
        make_trainer(home, {"method": "finetune"}, ["v1"], 8, width=4)
    make_trainer(home, {"method": "finetune"}, ["v1"], 6, dropout=0.2)
    return str(error.value)


def test_start_from_another_architecture_is_refused_in_one_line(one: dict[str, Any]) -> None:
    told = one["refused"]
    assert "embedding_dim (6 there, 8 here), width (32 there, 4 here)" in told
    assert "\n" not in told
