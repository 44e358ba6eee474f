"""The sharded classifier equals the dense one at every world size, on every mesh, heads and all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.compat.parents import parent_part
from pipeline.errors import ConfigError, DataError
from pipeline.identities import IdentityTable
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.implementations import blocked
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts, initial_rows
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.row_optimiser import RowOptimiser
from tests.dense import dense_loss
from tests.distributed.ranks import run_ranks

DIM, ROWS = 7, 23
COSFACE = MarginConfig(name="cosface", scale=16.0, m3=0.2)
ARCFACE = MarginConfig(name="arcface", scale=8.0, m2=0.3)
COMBINED = MarginConfig(name="combined", scale=12.0, m1=1.1, m2=0.2, m3=0.1)
NORM_SOFTMAX = MarginConfig(name="norm_softmax", scale=80.0)  # beyond what needs no running maximum
SOFTMAX = MarginConfig(name="softmax", scale=1.0)
WEIGHTS = (1.0, 0.7, 2.5)  # of the losses: new head, first and second parent

NEW_TABLE = IdentityTable(tuple(f"id{row:02d}" for row in range(ROWS)))
# Neither a prefix of the new table nor in its order, with identities that are gone.
OLD_TABLES = (
    IdentityTable(("id20", "gone-a", "id03", "id11", "id04", "gone-b", "id22", "id00", "gone-c")),
    IdentityTable(("id17", "id02", "id09")),
)
OLD_DIMS = (5, DIM)
REPEATS = [20, 3, 3, 11, 1, 0, 22, 5, 9, 3, 17, 22, 4]  # and identities that no parent knew
NO_OLD_IDENTITY = [1, 5, 6, 7, 8, 1, 10]


@dataclass
class Case:
    """One batch and one classifier with two parents."""

    margin: MarginConfig
    labels: list[int] = field(default_factory=lambda: REPEATS)
    implementation: str = "blocked"
    dtype: torch.dtype = torch.float64
    shard_ranks: int | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = [torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in self._shapes()]
        self.features, self.weight, *self.parents = (tensor.to(self.dtype) for tensor in draw)
        self.margins = [self.margin, ARCFACE, SOFTMAX]

    def _shapes(self) -> list[tuple[int, int]]:
        old = [(len(table), dim) for table, dim in zip(OLD_TABLES, OLD_DIMS, strict=True)]
        return [(len(self.labels), DIM), (ROWS, DIM), *old]

    def dense(self, features: Tensor, weight: Tensor) -> Tensor:
        """Losses by head, by the plain reference."""
        labels = torch.tensor(self.labels)
        losses = [dense_loss(features, weight, labels, self.margins[0])]
        for table, old, margin in zip(OLD_TABLES, self.parents, self.margins[1:], strict=True):
            old_labels = torch.tensor([table.row_of_key.get(NEW_TABLE.keys[row], -1) for row in self.labels])
            losses.append(dense_loss(features[:, : old.shape[1]], old.to(features.dtype), old_labels, margin))
        return torch.stack(losses)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, feature gradient and weight gradient in float64 by autograd over the whole classifier."""
        features, weight = (t.double().clone().requires_grad_() for t in (self.features, self.weight))
        losses = self.dense(features, weight)
        (losses * torch.tensor(WEIGHTS)).sum().backward()
        assert features.grad is not None
        assert weight.grad is not None
        return losses.detach(), features.grad, weight.grad

    def classifier(self, **config: Any) -> ShardedClassifier:
        """This rank's part."""
        mesh = ClassMesh.of_world("cpu", self.shard_ranks)
        heads = []
        for index, (table, old) in enumerate(zip(OLD_TABLES, self.parents, strict=True)):
            old_rows, new_rows = (
                torch.from_numpy(rows) for rows in parent_part(table, NEW_TABLE, mesh.shard, mesh.shards)
            )
            heads.append(Head(f"old{index}", old[old_rows], new_rows, self.margins[index + 1]))
        settings = ClassifierConfig.model_validate({"implementation": self.implementation, **config})
        made = ShardedClassifier("new", ROWS, DIM, self.margin, heads, mesh=mesh, config=settings)
        made.weight_CD = self.weight[made.first_row : made.end_row].clone()
        return made


def my_part(rank: int, parts: list[int]) -> slice:
    return slice(sum(parts[:rank]), sum(parts[: rank + 1]))


def one_step(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Losses and gradients of each case on this rank."""
    blocked.TILE_ROWS = 4
    results = []
    for case in cases:
        classifier, parts = case.classifier(), batch_parts(len(case.labels), world_size)
        mine = my_part(rank, parts)
        features = case.features[mine].clone().requires_grad_()
        losses = classifier(features, torch.tensor(case.labels)[mine], parts)
        (losses * torch.tensor(WEIGHTS)).sum().backward()
        gradient = classifier.gradient.total(classifier.mesh.replica_group)
        assert features.grad is not None
        results.append(
            {
                "losses": losses.detach().tolist(),
                "features": features.grad.tolist(),
                "weight": gradient.tolist() if classifier.mesh.replica == 0 else [],
            }
        )
    return results


def joined(results: list[list[dict[str, Any]]], case: int, what: str) -> Tensor:
    return torch.tensor([row for result in results for row in result[case][what]], dtype=torch.float64)


def check_equal(results: list[list[dict[str, Any]]], cases: list[Case]) -> None:
    for index, case in enumerate(cases):
        rtol, atol = (1e-5, 1e-5) if case.dtype == torch.float32 else (1e-9, 1e-11)
        losses, features, weight = case.expected()
        for result in results:
            torch.testing.assert_close(
                torch.tensor(result[index]["losses"], dtype=torch.float64), losses, rtol=rtol, atol=atol
            )
        torch.testing.assert_close(joined(results, index, "features"), features, rtol=rtol, atol=atol)
        torch.testing.assert_close(joined(results, index, "weight"), weight, rtol=rtol, atol=atol)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_losses_and_gradients_are_the_dense_ones(world_size: int) -> None:
    cases = [
        Case(margin, labels, implementation, dtype)
        for margin in (COSFACE, ARCFACE, COMBINED, NORM_SOFTMAX, SOFTMAX)
        for labels in (REPEATS, NO_OLD_IDENTITY)
        for implementation in ("dense", "blocked")
        for dtype in (torch.float64, torch.float32)
    ]
    cases += [Case(margin, REPEATS, "triton", torch.float32) for margin in (COSFACE, NORM_SOFTMAX)]
    assert cases[4].expected()[0][1:].tolist() == [0.0, 0.0], "a batch without old identities has no influence"
    check_equal(run_ranks(world_size, one_step, cases), cases)


def test_two_groups_of_two_ranks_give_what_one_process_gives() -> None:
    cases = [Case(margin, REPEATS, "blocked", torch.float64, shard_ranks=2) for margin in (COSFACE, SOFTMAX)]
    cases += [Case(ARCFACE, REPEATS, "blocked", torch.float64, shard_ranks=1)]
    check_equal(run_ranks(4, one_step, cases), cases)


OPTIMISERS = [
    OptimiserConfig(name="sgd", classifier_weight_decay=0.01),
    OptimiserConfig(name="adamw", classifier_weight_decay=0.1),
]


def twenty_steps(rank: int, world_size: int, cases: list[Case]) -> list[list[list[float]]]:
    """This rank's rows after 20 updates in float32, the features drawn anew each time."""
    blocked.TILE_ROWS = 4
    results = []
    for case in cases:
        for optimiser in OPTIMISERS:
            classifier = case.classifier()
            rows = RowOptimiser(classifier.weight_CD, optimiser)
            for step in range(20):
                features, labels = drawn_batch(step)
                parts = batch_parts(len(labels), world_size)
                mine = my_part(rank, parts)
                losses = classifier(features[mine].requires_grad_(), labels[mine], parts)
                (losses * torch.tensor(WEIGHTS)).sum().backward()
                rows.step(None, classifier.gradient.total(classifier.mesh.replica_group), 0.05)
                classifier.gradient.clear()
            results.append(classifier.weight_CD.tolist() if classifier.mesh.replica == 0 else [])
    return results


def drawn_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(9, DIM, generator=generator), torch.randint(ROWS, (9,), generator=generator)


def dense_twenty_steps(case: Case, config: OptimiserConfig) -> Tensor:
    weight = case.weight.double().clone().requires_grad_()
    decay = config.classifier_weight_decay
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD([weight], lr=0.05, momentum=0.9, weight_decay=decay)
        if config.name == "sgd"
        else torch.optim.AdamW([weight], lr=0.05, weight_decay=decay)
    )
    for step in range(20):
        features, labels = drawn_batch(step)
        optimiser.zero_grad()
        dense_loss(features.double(), weight, labels, case.margin).backward()
        optimiser.step()
    return weight.detach()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_after_twenty_updates_are_the_dense_ones(world_size: int) -> None:
    groups = [None, 2] if world_size == 4 else [None]
    cases = [Case(COSFACE, dtype=torch.float32, shard_ranks=shard_ranks) for shard_ranks in groups]
    results = run_ranks(world_size, twenty_steps, cases)
    runs = [(case, optimiser) for case in cases for optimiser in OPTIMISERS]
    for index, (case, optimiser) in enumerate(runs):
        weight = torch.tensor([row for result in results for row in result[index]], dtype=torch.float64)
        expected = dense_twenty_steps(case, optimiser)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_more_ranks_than_rows_leaves_some_empty() -> None:
    results = run_ranks(4, tiny_table)
    assert [result["rows"] for result in results] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    features = torch.tensor([[0.5, -1.0], [2.0, 0.1], [1.0, 1.0], [0.3, 0.2], [-1.0, 0.4]]).requires_grad_()
    loss = dense_loss(features, initial_rows(0, 5, 2, seed=0), torch.tensor([4, 0, 4, 1, 2]), COSFACE)
    assert all(result["loss"] == pytest.approx(loss.item(), rel=1e-6) for result in results)


def tiny_table(rank: int, world_size: int) -> dict[str, Any]:
    losses = {}
    for implementation in ("dense", "blocked"):
        config = ClassifierConfig.model_validate({"implementation": implementation})
        classifier = ShardedClassifier("new", 5, 2, COSFACE, mesh=ClassMesh.of_world("cpu"), config=config)
        parts = batch_parts(5, world_size)
        mine = my_part(rank, parts)
        features = torch.tensor([[0.5, -1.0], [2.0, 0.1], [1.0, 1.0], [0.3, 0.2], [-1.0, 0.4]])[mine].requires_grad_()
        loss = classifier(features, torch.tensor([4, 0, 4, 1, 2])[mine], parts)[0]
        loss.backward()
        losses[implementation] = loss.item()
    assert losses["dense"] == pytest.approx(losses["blocked"], rel=1e-6)
    return {"rows": (classifier.first_row, classifier.end_row), "loss": losses["blocked"]}


def collectives(rank: int, world_size: int) -> list[list[int]]:
    """Collectives of one step with 0, 1 and 3 parents, as the profiler counts them, on one group and on two."""
    counts = []
    for shard_ranks in (world_size, 1):
        mesh, per_parents = ClassMesh.of_world("cpu", shard_ranks), []
        for parents in (0, 1, 3):
            generator = torch.Generator().manual_seed(0)
            frozen = [
                Head(f"old{index}", torch.randn(3, DIM, generator=generator), torch.arange(3), COSFACE)
                for index in range(parents)
            ]
            classifier = ShardedClassifier("new", ROWS, DIM, COSFACE, frozen, mesh=mesh)
            features = torch.randn(4, DIM, generator=generator, requires_grad=True)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                classifier(features, torch.arange(4) + rank, [4] * world_size).sum().backward()
            per_parents.append(sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:")))
        counts.append(per_parents)
    return counts


def test_parents_cost_no_further_collective() -> None:
    assert run_ranks(2, collectives) == [[[3, 3, 3], [1, 1, 1]]] * 2


@pytest.mark.parametrize("label", [-1, ROWS])
def test_label_outside_the_table_is_named(label: int) -> None:
    classifier = ShardedClassifier("new", ROWS, DIM, COSFACE)
    with pytest.raises(DataError, match=f"label {label} is outside the identity table of {ROWS} rows"):
        classifier(torch.randn(2, DIM), torch.tensor([0, label]), [2])


def refused_mesh(_rank: int, _world_size: int) -> str:
    with pytest.raises(ConfigError) as error:
        ClassMesh.of_world("cpu", 2)
    return str(error.value)


def test_groups_that_do_not_come_out_even_are_refused() -> None:
    assert "classifier.shard_ranks=2 does not divide the 3 training processes" in run_ranks(3, refused_mesh)[0]


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_nan_feature_is_not_mistaken_for_an_unknown_identity(implementation: str) -> None:
    config = ClassifierConfig.model_validate({"implementation": implementation})
    classifier = ShardedClassifier("new", ROWS, DIM, COSFACE, config=config)
    features = torch.randn(3, DIM)
    features[1, 2] = torch.nan
    assert classifier(features, torch.tensor([0, 1, 2]), [3]).isnan().all()


def test_losses_do_not_saturate() -> None:
    classifier = ShardedClassifier("new", 2, 2, MarginConfig(name="norm_softmax", scale=500.0))
    classifier.weight_CD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    features = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    loss = classifier(features, torch.tensor([0]), [1])[0]
    assert loss.item() == pytest.approx(1000.0), "log-sum-exp minus the own logit, not the log of a probability of 0"


def test_rows_start_the_same_at_any_cut_and_differ() -> None:
    whole = initial_rows(0, 9000, 3, seed=5)
    parts = torch.cat(
        [initial_rows(0, 4000, 3, seed=5), initial_rows(4000, 4097, 3, 5), initial_rows(4097, 9000, 3, 5)]
    )
    assert torch.equal(whole, parts)
    assert len({tuple(row) for row in whole.tolist()}) == 9000
    assert not torch.equal(whole, initial_rows(0, 9000, 3, seed=6))
