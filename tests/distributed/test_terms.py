"""Every loss beside the new classifier's own equals its plain reference, at every world size, on every mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.methods.baselines import Regression
from pipeline.compat.parents import parent_part
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import NOT_HERE, Approach, Distil, Head, Identify, Objective
from pipeline.model.implementations import blocked
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts
from pipeline.model.sampling import sampled
from tests import dense
from tests.distributed.ranks import run_ranks
from tests.distributed.test_classifier import DIM, NEW_TABLE, NO_OLD_IDENTITY, OLD_TABLES, REPEATS, ROWS, my_part

COSFACE = MarginConfig(name="cosface", scale=16.0, m3=0.2)
ARCFACE = MarginConfig(name="arcface", scale=8.0, m2=0.3)
GUIDES = (slice(0, 5), slice(5, 5 + DIM))
NORM = MarginConfig(name="norm_softmax", scale=6.0)
HOT = MarginConfig(name="norm_softmax", scale=90.0)  # beyond what needs no running maximum
HALVED = MarginConfig(name="softmax", scale=1.0).model_copy(update={"scale": 0.5})  # temperature 2, no length
LATE = [22, 17, 1, 22, 11, 5, 9, 8, 17]  # without the first identities that the first parent knows
LOCALS, CONTRAST_SCALE, SEED = ("first", "second"), 4.0, 3


def penalty(cosine_M: Tensor, radius_M: Tensor) -> Tensor:
    return F.softplus(4 * (1 - cosine_M - radius_M)) + cosine_M.square() * radius_M


@dataclass(frozen=True)
class Contrast:
    """The own old feature against the old and the other new features of the batch."""

    name: str
    guide: slice

    def __call__(self, features_BD: Tensor, guides_BE: Tensor, labels_B: Tensor, own: slice) -> Tensor:
        new_BD, old_BD = F.normalize(features_BD), F.normalize(guides_BE[:, self.guide])
        padded_B = labels_B == NOT_HERE
        itself_bB = torch.eye(len(labels_B), dtype=torch.bool)[own]
        to_old_bB = (CONTRAST_SCALE * new_BD[own] @ old_BD.T).masked_fill(padded_B, -torch.inf)
        to_new_bB = (CONTRAST_SCALE * new_BD[own] @ new_BD.T).masked_fill(padded_B | itself_bB, -torch.inf)
        return torch.cat([to_old_bB, to_new_bB], dim=1).logsumexp(dim=1) - to_old_bB[itself_bB]


# Name, parent, margin and objective of each frozen head; the radii are the case's.
HEADS: list[tuple[str, int, MarginConfig, str]] = [
    ("kd", 0, NORM, "unknown"),
    ("kd-plain", 1, HALVED, "unknown"),
    ("lwf", 0, HOT, "all"),
    ("influence", 0, ARCFACE, "identify"),
    ("lwf-plain", 1, HALVED, "all"),
    ("near", 0, HALVED, "approach"),
    ("near-2", 1, COSFACE, "approach"),
]
BATCH_LOSSES = (Regression("l2", GUIDES[0]), Contrast("contrast", GUIDES[1]))
NAMES = ["new", *(name for name, *_ in HEADS), "l2", "contrast", *LOCALS]
WEIGHTS = torch.tensor([1.0, 0.7, 2.5, 0.3, 1.3, 0.9, 1.7, 0.4, 0.6, 1.1, 2.0, 0.8], dtype=torch.float64)


@dataclass
class Case:
    """One update with every kind of loss at once."""

    labels: list[int] = field(default_factory=lambda: REPEATS)
    implementation: str = "blocked"
    dtype: torch.dtype = torch.float64
    shard_ranks: int | None = None
    micros: int = 1
    rate: float = 1.0
    step: int = 0

    def __post_init__(self) -> None:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        samples, (first, second) = len(self.labels), OLD_TABLES
        shapes = [(samples, DIM), (samples, 5 + DIM), (samples, len(LOCALS)), (ROWS, DIM)]
        shapes += [(len(first), 5), (len(second), DIM)]
        made = [draw(*shape).to(self.dtype) for shape in shapes]
        self.features, self.guides, self.locals, self.weight, *self.parents = made
        self.radii = [old[:, 0].sigmoid() for old in self.parents]

    def head(self, number: int, shard: int, shards: int) -> Head:
        """A part of a frozen head."""
        name, parent, margin, kind = HEADS[number]
        old, new = (torch.from_numpy(rows) for rows in parent_part(OLD_TABLES[parent], NEW_TABLE, shard, shards))
        objective: Objective = Identify()
        if kind in ("unknown", "all"):
            objective = Distil(GUIDES[parent], unknown_only=kind == "unknown")
        elif kind == "approach":
            objective = Approach(self.radii[parent][old], penalty)
        return Head(name, self.parents[parent][old], new, margin, objective)

    def classifier(self) -> ShardedClassifier:
        """This rank's part."""
        mesh = ClassMesh.of_world("cpu", self.shard_ranks)
        heads = [self.head(number, mesh.shard, mesh.shards) for number in range(len(HEADS))]
        settings = ClassifierConfig.model_validate(
            {"implementation": self.implementation, "sample_rate": self.rate, "sample_parents": True}
        )
        extras: dict[str, Any] = {"batch_losses": BATCH_LOSSES, "local_losses": LOCALS}
        made = ShardedClassifier("new", ROWS, DIM, COSFACE, heads, **extras, seed=SEED, mesh=mesh, config=settings)
        made.weight_CD = self.weight[made.first_row : made.end_row].clone()
        return made

    def parts(self, world_size: int) -> list[tuple[int, ...]]:
        """Samples of each micro-batch of each rank."""
        return [tuple(batch_parts(part, self.micros)) for part in batch_parts(len(self.labels), world_size)]

    def blocks(self, world_size: int) -> list[list[int]]:
        """Samples that meet: those of one micro-batch in one group of ranks."""
        group, blocks, first = self.shard_ranks or world_size, {}, 0  # type: int, dict[tuple[int, int], list[int]], int
        for rank, parts in enumerate(self.parts(world_size)):
            for micro, part in enumerate(parts):
                blocks.setdefault((rank // group, micro), []).extend(range(first, first + part))
                first += part
        return list(blocks.values())

    def _taking_part(self, rows_C: Tensor) -> Tensor:
        chosen_C = sampled(rows_C, self.rate, SEED, self.step) if self.rate < 1 else torch.ones_like(rows_C).bool()
        return chosen_C | torch.isin(rows_C, torch.tensor(self.labels))

    def _dense_head(self, number: int, features: Tensor) -> Tensor:
        head, kind = self.head(number, 0, 1), HEADS[number][3]
        assert isinstance(head.rows_C, Tensor)
        chosen, guides = self._taking_part(head.rows_C), self.guides.double()
        weight, rows = head.weight_CD[chosen].double(), head.rows_C[chosen].tolist()
        columns = torch.tensor([rows.index(label) if label in rows else -1 for label in self.labels])
        if isinstance(head.objective, Approach):
            return dense.approach_loss(features, weight, head.objective.radius_C[chosen].double(), columns, penalty)
        if isinstance(head.objective, Distil):
            counted = columns < 0 if kind == "unknown" else torch.ones_like(columns).bool()
            return dense.distilled_loss(features, guides[:, head.objective.guide], weight, counted, head.margin)
        return dense.influence_loss(features, weight, columns, head.margin, weight.shape[1])

    def expected(self, world_size: int) -> dict[str, Tensor]:
        """Losses and gradients in float64 by autograd over the whole batch."""
        features, weight, own = (t.double().clone().requires_grad_() for t in (self.features, self.weight, self.locals))
        chosen = self._taking_part(torch.arange(ROWS))
        columns = torch.cumsum(chosen, dim=0)[self.labels] - 1
        losses = [dense.dense_loss(features, weight[chosen], columns, COSFACE)]
        losses += [self._dense_head(number, features) for number in range(len(HEADS))]
        losses.append(dense.regression_loss(features, self.guides[:, GUIDES[0]].double()))
        blocks = self.blocks(world_size)
        losses.append(dense.contrast_loss(features, self.guides[:, GUIDES[1]].double(), CONTRAST_SCALE, blocks))
        stacked = torch.cat([torch.stack(losses), own.mean(dim=0)])
        (stacked * WEIGHTS).sum().backward()
        gradients = {"features": features.grad, "weight": weight.grad, "locals": own.grad}
        return {"losses": stacked.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def one_update(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    blocked.TILE_ROWS = 4
    return [update(rank, world_size, case) for case in cases]


def update(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Losses and gradients of a case on this rank."""
    classifier, parts = case.classifier(), case.parts(world_size)
    assert classifier.loss_names == NAMES
    totals = [sum(part) for part in parts]
    mine = my_part(rank, totals)
    labels, guides = torch.tensor(case.labels)[mine], case.guides[mine]
    features, own = (tensor[mine].clone().requires_grad_() for tensor in (case.features, case.locals))
    window = classifier.window(labels, totals, case.step) if case.micros > 1 else None
    losses = torch.zeros(len(NAMES), dtype=case.dtype)
    for micro in range(case.micros):
        now, sizes = my_part(micro, list(parts[rank])), [part[micro] for part in parts]
        told = classifier(features[now], labels[now], sizes, case.step, window, guides[now], own[now])
        (told * WEIGHTS.to(case.dtype)).sum().backward()
        losses += told.detach()
    gradient, columns = classifier.gradient.total(classifier.mesh.replica_group), classifier.gradient.columns
    rows = torch.zeros_like(classifier.weight_CD)
    rows[slice(None) if columns is None else columns] = gradient
    assert features.grad is not None
    assert own.grad is not None
    return {
        "losses": losses.tolist(),
        "features": features.grad.tolist(),
        "locals": own.grad.tolist(),
        "weight": rows.tolist() if classifier.mesh.replica == 0 else [],
    }


def close(got: list[Any], wanted: Tensor, dtype: torch.dtype, told: str) -> None:
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-9, 1e-11)
    got_64 = torch.tensor(got, dtype=torch.float64)
    torch.testing.assert_close(got_64, wanted, rtol=rtol, atol=atol, msg=f"{told}: {got_64 - wanted}")


def check(world_size: int, cases: list[Case]) -> None:
    results = run_ranks(world_size, one_update, cases)
    for index, case in enumerate(cases):
        expected = case.expected(world_size)
        for result in results:
            close(result[index]["losses"], expected["losses"], case.dtype, f"case {index}: losses {NAMES}")
        for what in ("features", "locals", "weight"):
            whole = [row for result in results for row in result[index][what]]
            close(whole, expected[what], case.dtype, f"case {index}: gradient of {what}")


def step_without(*rows: int) -> int:
    """A step that samples none of some rows."""
    return next(step for step in range(200) if not sampled(torch.tensor(rows), 0.4, SEED, step).any())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_losses_and_gradients_are_the_plain_ones(world_size: int) -> None:
    cases = [
        Case(labels, implementation) for labels in (REPEATS, NO_OLD_IDENTITY) for implementation in ("dense", "blocked")
    ]
    cases.append(Case(implementation="triton", dtype=torch.float32))
    cases += [Case(micros=3), Case(micros=2, implementation="dense")]
    cases += [Case(labels, rate=0.4, step=7) for labels in (REPEATS, NO_OLD_IDENTITY)]
    cases.append(Case(NO_OLD_IDENTITY, rate=0.4, step=step_without(2, 9, 17)))
    cases += [Case(micros=3, rate=0.4, step=7), Case(LATE, rate=0.4, step=step_without(0, 20))]
    silent = [name for name, loss in zip(NAMES, cases[2].expected(world_size)["losses"], strict=True) if loss == 0]
    assert silent == ["influence", "near", "near-2"], "of a batch in which no parent knows anybody"
    check(world_size, cases)


def test_two_groups_of_two_ranks_give_what_one_process_gives() -> None:
    cases = [Case(shard_ranks=2), Case(NO_OLD_IDENTITY, "dense", shard_ranks=2), Case(shard_ranks=1)]
    cases += [Case(shard_ranks=2, micros=3), Case(shard_ranks=2, rate=0.4, step=7)]
    check(4, cases)


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_feature_that_is_no_number_makes_every_loss_none(implementation: str) -> None:
    case = Case(implementation=implementation)
    case.features[:2, 2] = torch.nan
    case.labels = [3, 17, *REPEATS[2:]]  # the first parent knows row 3 alone, the second row 17
    config = ClassifierConfig.model_validate({"implementation": implementation})
    heads = [case.head(number, 0, 1) for number in range(len(HEADS))]
    classifier = ShardedClassifier("new", ROWS, DIM, COSFACE, heads, batch_losses=BATCH_LOSSES, config=config)
    classifier.weight_CD = case.weight.clone()
    losses = classifier(case.features, torch.tensor(case.labels), [len(case.labels)], guides_bE=case.guides)
    assert losses.isnan().all(), dict(zip(classifier.loss_names, losses.tolist(), strict=True))
