"""The classifier sharded by identity over the ranks, with the parents' frozen classifiers beside it.

However many heads there are, a step costs three collectives: one gather of features and labels, one exchange of
softmax statistics, one reduce-scatter of feature gradients. `docs/classifier.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model import collectives
from pipeline.model.heads import NOT_HERE, Head, HeadBatch, combine, feature_gradient, statistics
from pipeline.model.implementations import Name, Precision, Sink, choose
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.row_gradient import Columns, RowGradient, span
from pipeline.model.rows import initial_rows, row_range
from pipeline.model.sampling import most_sampled, sampled
from pipeline.schema import Config


class ClassifierConfig(Config):
    """How the classifier is computed and where it starts."""

    implementation: Name = Field(
        "auto", description="dense: all logits at once; blocked: tiles, anywhere; triton: tiles, on a GPU; auto"
    )
    precision: Precision = Field("fp32", description="of the tiles on a GPU; sums and rows stay fp32")
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the prototypes in a step (Partial FC); 1: all")
    sample_parents: bool = Field(False, description="sample the parents' negatives too, by the same identities")
    start: str | None = Field(None, description="parent from whose prototypes the new ones start; none: fresh")
    shard_ranks: int | None = Field(None, ge=1, description="ranks that hold the classifier together; none: all")
    fused_update: bool | None = Field(
        None,
        description="update each tile of prototypes in backward, so that their gradient never exists as a whole; "
        "none: wherever it can be (no clipping, no accumulation, no replicas)",
    )


@dataclass(frozen=True)
class Selection:
    """The prototypes that take part in a step: a part of each head, and which columns of it they are (None: all)."""

    heads: tuple[Head, ...]
    columns: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Window:
    """What the micro-batches of one update share: their prototypes, and over how many samples each loss is a mean."""

    selection: Selection
    samples_H: Tensor


class ShardedClassifier:
    """This rank's rows of a (rows, dim) classifier, and the losses of a batch against it and its parents.

    The rows belong to an optimiser of this rank, not to the engine that replicates the backbone (the engine would
    overwrite every shard with rank 0's). Their gradient is collected in `gradient`, or, where `update` is set, handed
    to it tile by tile in backward.

    Args:
        name: of the generation being trained; the first loss.
        rows: identities of the whole classifier.
        dim: embedding dimension.
        margin: of the new classifier.
        parents: frozen heads, this rank's part of each, aligned to the same identity table.
        seed: of the initial rows and of the sampling, which are the same at every world size.
        mesh: which ranks hold it.
        config: implementation, precision and sampling.
        device: where this rank's rows lie.

    Raises:
        ConfigError: the implementation cannot run on the device.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        dim: int,
        margin: MarginConfig,
        parents: Sequence[Head] = (),
        seed: int = 0,
        mesh: ClassMesh | None = None,
        config: ClassifierConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.rows, self.margin, self.parents = name, rows, margin, tuple(parents)
        self.config, self.seed, self.mesh = config or ClassifierConfig(), seed, mesh or ClassMesh()
        self.implementation = choose(self.config.implementation, self.config.precision, torch.device(device))
        self.first_row, self.end_row = row_range(rows, self.mesh.shard, self.mesh.shards)
        self.weight_CD = initial_rows(self.first_row, self.end_row, dim, seed).to(device)
        self.gradient = RowGradient()
        self.update: Callable[[Columns, Tensor], None] | None = None

    @property
    def heads(self) -> tuple[Head, ...]:
        """The new head, then the parents'."""
        own = Head(self.name, self.weight_CD, range(self.first_row, self.end_row), self.margin)
        return (own, *self.parents)

    def __call__(
        self, features_bD: Tensor, labels_b: Tensor, parts: Sequence[int], step: int = 0, window: Window | None = None
    ) -> Tensor:
        """Losses of the global batch, one a head, the same on every rank.

        Each loss is the mean of log-sum-exp minus own logit over those samples of the global batch whose identity
        has a prototype in that head; 0 where none has. `backward` gives each rank the gradient of these global
        means with respect to its own features and rows: nothing is left to be averaged.

        Args:
            features_bD: (b, D) float32 or float64, this rank's part of the global batch, not normalised.
            labels_b: (b,) int64 rows of the identity table.
            parts: samples of each rank of the world.
            step: names the sampled prototypes.
            window: of the update that this batch is a part of; None: it is the whole.

        Returns:
            (1 + parents,) losses; under a window, the batch's share of them.

        Raises:
            DataError: a label is outside the table.
        """
        self._check(labels_b)
        group_parts = self.mesh.group_parts(list(parts))
        assert len(features_bD) == len(labels_b) == group_parts[self.mesh.shard], "not this rank's part of the batch"
        losses_H: Tensor = _ShardedSoftmax.apply(  # type: ignore[no-untyped-call]
            features_bD, labels_b, self, max(parts), step, window
        )
        return losses_H

    def window(self, labels_b: Tensor, parts: Sequence[int], step: int) -> Window:
        """Prepare an update of several micro-batches. Collective.

        Args:
            labels_b: of all of this rank's samples of the update.
            parts: samples of each rank of the world in the update.
            step: of the update.
        """
        self._check(labels_b)
        labels_B = collectives.gather_labels(labels_b, max(parts), self.mesh.shard_group)
        labels_B = self._over_replicas(labels_B, max(parts))
        count_H = torch.stack([(head.columns_of(labels_B) != NOT_HERE).sum() for head in self.heads])
        if self.mesh.shard_group is not None:
            dist.all_reduce(count_H, group=self.mesh.shard_group)
        return Window(self._select(labels_B, step), count_H)

    def selection(self, labels_B: Tensor, longest: int, step: int) -> Selection:
        """The prototypes of a step whose shard group has the samples `labels_B`. Collective if it samples."""
        if self.config.sample_rate < 1:
            labels_B = self._over_replicas(labels_B, longest)
        return self._select(labels_B, step)

    def sink(self, columns: Tensor | None, weight_KD: Tensor) -> Sink:
        """Where backward hands the gradient of the prototypes that took part."""
        if self.update is None:
            return self.gradient.sink(columns, weight_KD)
        update = self.update
        return lambda first, gradient_TD: update(span(columns, first, len(gradient_TD)), gradient_TD)

    def _select(self, labels_B: Tensor, step: int) -> Selection:
        """Those that the step samples, and those of the samples' own identities."""
        heads, columns = list(self.heads), [None] * (1 + len(self.parents))  # type: list[Head], list[Tensor | None]
        for index, head in enumerate(heads) if self.config.sample_rate < 1 else ():
            if index == 0 or self.config.sample_parents:
                chosen_C = sampled(head.rows_C, self.config.sample_rate, self.seed, step, self.weight_CD.device)
                own_B = head.columns_of(labels_B)
                chosen_C[own_B[own_B != NOT_HERE]] = True
                columns_K = torch.nonzero(chosen_C).flatten()
                bound = most_sampled(len(chosen_C), self.config.sample_rate) + len(labels_B)
                assert len(columns_K) <= bound, "more rows than memory was planned for"
                columns[index], heads[index] = columns_K, head.only(columns_K)
        return Selection(tuple(heads), tuple(columns))

    def _over_replicas(self, labels_B: Tensor, longest: int) -> Tensor:
        """Labels of every shard group, so that all replicas of a row know whether it is a positive."""
        return collectives.gather_labels(labels_B, longest * self.mesh.shards, self.mesh.replica_group)

    def _check(self, labels_b: Tensor) -> None:
        outside_K = labels_b[(labels_b < 0) | (labels_b >= self.rows)]
        if len(outside_K):
            raise DataError(
                f"label {int(outside_K[0])} is outside the identity table of {self.rows} rows: "
                "the shards and the table do not fit; pack the data set again"
            )


class _ShardedSoftmax(torch.autograd.Function):
    """Forward scans the prototypes once, which gives the losses and the feature gradients but for their factors;
    backward passes over the new ones again, for their own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_bD: Tensor,
        labels_b: Tensor,
        classifier: ShardedClassifier,
        longest: int,
        step: int,
        window: Window | None,
    ) -> Tensor:
        mesh = classifier.mesh
        features_BD, labels_B = collectives.gather_batch(features_bD, labels_b, longest, mesh.shard_group)
        selection = window.selection if window else classifier.selection(labels_B, longest, step)
        batches = [HeadBatch.of(head, features_BD, labels_B) for head in selection.heads]
        scans = [classifier.implementation.scan(batch) for batch in batches]
        own_HBS = torch.stack([statistics(batch, scan) for batch, scan in zip(batches, scans, strict=True)])
        joined_WHBS = collectives.exchange(own_HBS, mesh.shard_group)
        log_sum_exp_HB, own_HB, known_HB = combine(joined_WHBS)
        loss_HB = torch.where(known_HB, log_sum_exp_HB - own_HB, 0.0)
        totals_2H = torch.stack([loss_HB.sum(dim=1), known_HB.sum(dim=1).to(loss_HB.dtype)])
        if mesh.replica_group is not None:
            dist.all_reduce(totals_2H, group=mesh.replica_group)
        samples_H = (window.samples_H.to(loss_HB.dtype) if window else totals_2H[1]).clamp_min(1)
        ctx.classifier, ctx.columns, ctx.batches, ctx.scans = classifier, selection.columns[0], batches, scans
        ctx.log_sum_exp_HB, ctx.weight_HB = log_sum_exp_HB, known_HB / samples_H[:, None]
        ctx.samples = len(features_bD)
        return totals_2H[0] / samples_H

    @staticmethod
    def backward(ctx: Any, *loss_gradients_H: Tensor) -> tuple[Tensor | None, ...]:
        classifier, batches, scans = ctx.classifier, ctx.batches, ctx.scans
        weight_HB = ctx.weight_HB * loss_gradients_H[0][:, None]
        total_BD = torch.zeros_like(batches[0].unit_BD)
        for batch, scan, log_sum_exp_B, weight_B in zip(batches, scans, ctx.log_sum_exp_HB, weight_HB, strict=True):
            gradient_BD = feature_gradient(batch, scan, log_sum_exp_B, weight_B)
            total_BD[:, : gradient_BD.shape[1]] += gradient_BD
        scattered = collectives.ReduceScatter(total_BD, classifier.mesh.shard_group)  # on its way during what follows
        new = batches[0]
        sink = classifier.sink(ctx.columns, new.head.weight_CD)
        classifier.implementation.weight_gradient(new, scans[0], ctx.log_sum_exp_HB[0], weight_HB[0], sink)
        return scattered.wait()[: ctx.samples], None, None, None, None, None
