"""The sharded classifier equals the dense one at every world size, heads and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.compat.parents import parent_part
from pipeline.errors import DataError
from pipeline.identities import IdentityTable
from pipeline.model import heads
from pipeline.model.classifier import ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.margins import MarginConfig
from pipeline.model.rows import batch_parts, initial_rows
from tests.dense import dense_loss
from tests.distributed.ranks import run_ranks

DIM, ROWS, BATCH = 7, 23, 13
COSFACE = MarginConfig(name="cosface", scale=16.0, m3=0.2)
ARCFACE = MarginConfig(name="arcface", scale=8.0, m2=0.3)
NORM_SOFTMAX = MarginConfig(name="norm_softmax", scale=10.0)
SOFTMAX = MarginConfig(name="softmax", scale=1.0)
WEIGHTS = (1.0, 0.7, 2.5)  # of the losses: new head, first and second parent

NEW_TABLE = IdentityTable(tuple(f"id{row:02d}" for row in range(ROWS)))
# Neither a prefix of the new table nor in its order, with identities that are gone.
OLD_TABLES = (
    IdentityTable(("id20", "gone-a", "id03", "id11", "id04", "gone-b", "id22", "id00", "gone-c")),
    IdentityTable(("id17", "id02", "id09")),
)
OLD_DIMS = (5, DIM)


def problem(new_margin: MarginConfig, labels: list[int] | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    known = torch.tensor([20, 3, 3, 11, 1, 0, 22, 5, 9, 3, 17, 22, 4])  # repeats, and identities that no parent knew
    return {
        "features": draw(BATCH, DIM),
        "labels": torch.tensor(labels) if labels else known,
        "weight": draw(ROWS, DIM),
        "parents": [draw(len(table), dim) for table, dim in zip(OLD_TABLES, OLD_DIMS, strict=True)],
        "margins": [new_margin, ARCFACE, SOFTMAX],
    }


def dense(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses by head, feature gradient and weight gradient by autograd over the whole classifier."""
    features = case["features"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    losses = [dense_loss(features, weight, case["labels"], case["margins"][0])]
    for table, old, margin in zip(OLD_TABLES, case["parents"], case["margins"][1:], strict=True):
        keys = [NEW_TABLE.keys[row] for row in case["labels"]]
        old_labels = torch.tensor([table.row_of_key.get(key, -1) for key in keys])
        losses.append(dense_loss(features[:, : old.shape[1]], old, old_labels, margin))
    sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)).backward()  # type: ignore[union-attr]
    assert features.grad is not None
    assert weight.grad is not None
    return torch.stack(losses).detach(), features.grad, weight.grad


def sharded(rank: int, world_size: int, case: dict[str, Any], tile_rows: int) -> dict[str, Any]:
    heads.TILE_ROWS = tile_rows
    parents = []
    for index, (table, old) in enumerate(zip(OLD_TABLES, case["parents"], strict=True)):
        old_rows, new_rows = parent_part(table, NEW_TABLE, rank, world_size)
        head = Head(
            f"old{index}", old[torch.from_numpy(old_rows)], torch.from_numpy(new_rows), case["margins"][index + 1]
        )
        parents.append(head)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    classifier = ShardedClassifier("new", ROWS, DIM, case["margins"][0], parents, group=group).double()
    classifier.weight_CD.data.copy_(case["weight"][classifier.first_row : classifier.end_row])
    parts = batch_parts(len(case["labels"]), world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    features = case["features"][mine].clone().requires_grad_()
    losses = classifier(features, case["labels"][mine], len(case["labels"]))
    (losses * torch.tensor(WEIGHTS)).sum().backward()
    gradient = classifier.weight_CD.grad
    assert gradient is not None
    assert features.grad is not None
    return {
        "losses": losses.detach().tolist(),
        "features": features.grad.tolist(),
        "weight": gradient.tolist(),
        "rows": (classifier.first_row, classifier.end_row),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("margin", [COSFACE, ARCFACE, NORM_SOFTMAX, SOFTMAX], ids=lambda margin: margin.name)
def test_sharded_equals_dense(world_size: int, margin: MarginConfig) -> None:
    case = problem(margin)
    expected_losses, expected_features, expected_weight = dense(case)
    results = run_ranks(world_size, sharded, case, 4)
    for result in results:
        torch.testing.assert_close(torch.tensor(result["losses"], dtype=torch.float64), expected_losses)
    features = torch.tensor([row for result in results for row in result["features"]], dtype=torch.float64)
    weight = torch.tensor([row for result in results for row in result["weight"]], dtype=torch.float64)
    torch.testing.assert_close(features, expected_features)
    torch.testing.assert_close(weight, expected_weight)


def test_batch_without_old_identities_has_no_influence() -> None:
    case = problem(COSFACE, labels=[1, 5, 6, 7, 8, 1, 10])
    case["features"] = case["features"][:7]
    expected_losses, expected_features, _ = dense(case)
    assert expected_losses[1:].tolist() == [0.0, 0.0]
    results = run_ranks(2, sharded, case, 4)
    features = torch.tensor([row for result in results for row in result["features"]], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(results[0]["losses"], dtype=torch.float64), expected_losses)
    torch.testing.assert_close(features, expected_features)


def test_more_ranks_than_rows_leaves_some_empty() -> None:
    results = run_ranks(4, tiny_table)
    assert [result["rows"] for result in results] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    features = torch.tensor([[0.5, -1.0], [2.0, 0.1], [1.0, 1.0], [0.3, 0.2], [-1.0, 0.4]]).requires_grad_()
    loss = dense_loss(features, initial_rows(0, 5, 2, seed=0), torch.tensor([4, 0, 4, 1, 2]), COSFACE)
    assert all(result["loss"] == pytest.approx(loss.item(), rel=1e-6) for result in results)


def tiny_table(rank: int, world_size: int) -> dict[str, Any]:
    classifier = ShardedClassifier("new", 5, 2, COSFACE, group=torch.distributed.group.WORLD)
    parts = batch_parts(5, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    features = torch.tensor([[0.5, -1.0], [2.0, 0.1], [1.0, 1.0], [0.3, 0.2], [-1.0, 0.4]])[mine].requires_grad_()
    loss = classifier(features, torch.tensor([4, 0, 4, 1, 2])[mine], 5)[0]
    loss.backward()
    return {"rows": (classifier.first_row, classifier.end_row), "loss": loss.item()}


def collectives(rank: int, world_size: int) -> list[int]:
    """Collectives of one step with 0, 1 and 3 parents, as the profiler counts them."""
    counts = []
    for parents in (0, 1, 3):
        generator = torch.Generator().manual_seed(0)
        frozen = [
            Head(f"old{index}", torch.randn(3, DIM, generator=generator), torch.arange(3), COSFACE)
            for index in range(parents)
        ]
        classifier = ShardedClassifier("new", ROWS, DIM, COSFACE, frozen, group=torch.distributed.group.WORLD)
        features = torch.randn(4, DIM, generator=generator, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            classifier(features, torch.arange(4) + rank, 4 * world_size).sum().backward()
        counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:")))
    return counts


def test_parents_cost_no_further_collective() -> None:
    assert run_ranks(2, collectives) == [[3, 3, 3], [3, 3, 3]]


@pytest.mark.parametrize("label", [-1, ROWS])
def test_label_outside_the_table_is_named(label: int) -> None:
    classifier = ShardedClassifier("new", ROWS, DIM, COSFACE)
    with pytest.raises(DataError, match=f"label {label} is outside the identity table of {ROWS} rows"):
        classifier(torch.randn(2, DIM), torch.tensor([0, label]), 2)


def test_nan_feature_is_not_mistaken_for_an_unknown_identity() -> None:
    classifier = ShardedClassifier("new", ROWS, DIM, COSFACE)
    features = torch.randn(3, DIM)
    features[1, 2] = torch.nan
    assert classifier(features, torch.tensor([0, 1, 2]), 3).isnan().all()


def test_rows_start_the_same_at_any_cut_and_differ() -> None:
    whole = initial_rows(0, 9000, 3, seed=5)
    parts = torch.cat(
        [initial_rows(0, 4000, 3, seed=5), initial_rows(4000, 4097, 3, 5), initial_rows(4097, 9000, 3, 5)]
    )
    assert torch.equal(whole, parts)
    assert len({tuple(row) for row in whole.tolist()}) == 9000
    assert not torch.equal(whole, initial_rows(0, 9000, 3, seed=6))
