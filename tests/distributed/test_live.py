"""Prototypes that follow the parent: where they are after each update, however the ranks share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.rows import batch_parts, initial_rows
from pipeline.training.optimiser import learning_rate
from tests import dense
from tests.distributed.ranks import run_ranks
from tests.distributed.small_parents import (
    BATCH,
    MARGIN,
    OLD_DIMS,
    SEED,
    STEPS,
    TABLE,
    PlainParent,
    backbone_config,
    drawn,
    make_parent,
    make_trainer,
    plain,
    use_plain_backbones,
)

WEIGHT, PARENT = 0.7, "v1"
SETTINGS = {"method": "live", "weight": WEIGHT}
# Ranks, micro-batches of an update, ranks that hold the classifier together.
SHARED = [(1, 1, None), (1, 3, None), (2, 1, None), (2, 2, 1), (3, 1, None), (4, 1, 2), (4, 2, None)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    run_ranks(1, prepare, folder)
    return folder


def prepare(_rank: int, _world_size: int, home: Path) -> None:
    use_plain_backbones()
    make_parent(home, PARENT)
    torch.save(reference(home), home / "reference.pt")


def reference(home: Path) -> tuple[list[list[float]], Tensor]:
    """Losses of each step and the prototypes after the last, in float64, by plain descent."""
    parent, dim = PlainParent(home, PARENT), OLD_DIMS[PARENT]
    torch.manual_seed(SEED)
    network = plain(backbone_config(dim)).double()
    rows, old_CD = initial_rows(0, len(TABLE), dim, SEED).double().requires_grad_(), parent.live()
    optimiser, told = make_trainer(home, SETTINGS, [PARENT], dim).config.optimiser, []
    for step in range(STEPS):
        images, labels = drawn(step)
        features = network(images.double())
        new = dense.dense_loss(features, rows, labels, MARGIN)
        old = dense.influence_loss(features, old_CD, labels, parent.margin, dim)
        told.append([new.item(), old.item()])
        parameters = [*network.parameters(), rows]
        gradients = torch.autograd.grad(new + WEIGHT * old, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data.sub_(gradient, alpha=learning_rate(optimiser, step, STEPS))
        unit = F.normalize(parent.features(images))
        for row in set(labels.tolist()):
            old_CD[row] = F.normalize(unit[labels == row].mean(dim=0), dim=0)
    return told, old_CD


def trained(rank: int, world_size: int, home: Path, accumulation: int, shard_ranks: int | None) -> tuple[Any, Any, int]:
    """Losses of each step, this rank's part of the prototypes after the last, and its first row."""
    use_plain_backbones()
    trainer = make_trainer(home, SETTINGS, [PARENT], OLD_DIMS[PARENT], accumulation, shard_ranks)
    parts = batch_parts(BATCH, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    batches = [drawn(step) for step in range(STEPS)]
    told = [trainer.step(images[mine], labels[mine], n)[0].tolist() for n, (images, labels) in enumerate(batches)]
    (head,) = trainer.classifier.parents
    return told, head.weight_CD.tolist(), trainer.classifier.first_row


@pytest.mark.parametrize(("ranks", "accumulation", "shard_ranks"), SHARED)
def test_losses_and_prototypes_are_those_of_plain_descent(
    home: Path, ranks: int, accumulation: int, shard_ranks: int | None
) -> None:
    losses, old_CD = torch.load(home / "reference.pt", weights_only=True)
    for told, part, first_row in run_ranks(ranks, trained, home, accumulation, shard_ranks):
        assert told == [pytest.approx(step, rel=2e-5) for step in losses]
        wanted = old_CD[first_row : first_row + len(part)].float()
        torch.testing.assert_close(torch.tensor(part).view(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def given_up(_rank: int, _world_size: int, home: Path) -> list[bool]:
    """Whether the prototypes are where they were after an update that was no number."""
    use_plain_backbones()
    same = []
    for accumulation in (1, 2):
        trainer = make_trainer(home, SETTINGS, [PARENT], OLD_DIMS[PARENT], accumulation)
        (head,) = trainer.classifier.parents
        before, (images, labels) = head.weight_CD.clone(), drawn(0)
        images[-1] = torch.nan
        assert not trainer.step(images, labels, 0)[0].isfinite().all()
        trainer.classifier.followers.move()
        same.append(torch.equal(head.weight_CD, before))
    return same


def test_an_update_that_is_given_up_moves_no_prototype(home: Path) -> None:
    assert run_ranks(1, given_up, home) == [[True, True]]
