"""The classifier sharded by identity over the ranks, with the parents' frozen classifiers beside it.

However many heads and further losses there are, a step costs three collectives: one gather of features and labels, one
exchange of softmax statistics, one reduce-scatter of feature gradients. `docs/classifier.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.errors import DataError
from pipeline.model import collectives
from pipeline.model.followers import Followers
from pipeline.model.heads import NOT_HERE, Distil, Head
from pipeline.model.implementations import Name, Precision, Sink, choose
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.row_gradient import Columns, RowGradient, span
from pipeline.model.rows import initial_rows, row_range
from pipeline.model.sampling import most_sampled, sampled
from pipeline.model.sharded_losses import ShardedLosses
from pipeline.model.terms import BatchLoss
from pipeline.parts import part
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
        description="update prototypes tile by tile, so that their gradient never exists as a whole; "
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
    samples_L: Tensor


class ShardedClassifier:
    """This rank's rows of a (rows, dim) classifier, and the losses of a batch against it and its parents.

    The rows belong to an optimiser of this rank, not to the engine that replicates the backbone (the engine would
    overwrite every shard with rank 0's). Their gradient is collected in `gradient`, or, where `fused`, kept back by
    backward and made tile by tile when `spend` asks for it.

    Args:
        name: of the generation being trained; the first loss.
        rows: identities of the whole classifier.
        dim: embedding dimension.
        margin: of the new classifier.
        parents: frozen heads, this rank's part of each, aligned to the same identity table.
        batch_losses: over the gathered batch, without prototypes.
        local_losses: names of those that each rank computes for its own samples.
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
        *,
        batch_losses: Sequence[BatchLoss] = (),
        local_losses: Sequence[str] = (),
        seed: int = 0,
        mesh: ClassMesh | None = None,
        config: ClassifierConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.rows, self.margin, self.parents = name, rows, margin, tuple(parents)
        self.batch_losses, self.local_losses = tuple(batch_losses), tuple(local_losses)
        self.config, self.seed, self.mesh = config or ClassifierConfig(), seed, mesh or ClassMesh()
        self.implementation = choose(self.config.implementation, self.config.precision, torch.device(device))
        self.first_row, self.end_row = row_range(rows, self.mesh.shard, self.mesh.shards)
        self.weight_CD = initial_rows(self.first_row, self.end_row, dim, seed).to(device)
        self.gradient = RowGradient()
        self.followers = Followers(self.parents, self.mesh)
        self.fused = False
        self._kept_back: tuple[Callable[[Sink], None], Tensor | None] | None = None

    @property
    def heads(self) -> tuple[Head, ...]:
        """The new head, then the parents'."""
        own = Head(self.name, self.weight_CD, range(self.first_row, self.end_row), self.margin)
        return (own, *self.parents)

    @property
    def loss_names(self) -> list[str]:
        """Of what a call returns: the new head, the parents' heads, the losses of the batch, those of the ranks."""
        heads = [head.name for head in self.heads]
        return [*heads, *(loss.name for loss in self.batch_losses), *self.local_losses]

    def __call__(
        self,
        features_bD: Tensor,
        labels_b: Tensor,
        parts: Sequence[int],
        step: int = 0,
        window: Window | None = None,
        guides_bE: Tensor | None = None,
        locals_bK: Tensor | None = None,
    ) -> Tensor:
        """Losses of the global batch, the same on every rank.

        Each loss is the mean over those samples of the global batch that count for it (for a head, those whose
        identity has a prototype in it); 0 where none does. `backward` gives each rank the gradient of these global
        means with respect to its own features, rows and local losses: nothing is left to be averaged.

        Args:
            features_bD: (b, D) float32 or float64, this rank's part of the global batch, not normalised.
            labels_b: (b,) int64 rows of the identity table.
            parts: samples of each rank of the world.
            step: names the sampled prototypes.
            window: of the update that this batch is a part of; None: it is the whole.
            guides_bE: (b, E) the parents' features of the same images, side by side, where a loss asks for them.
            locals_bK: (b, K) losses of `local_losses`.

        Returns:
            (losses,) in the order of `loss_names`; under a window, the batch's share of them.

        Raises:
            DataError: a label is outside the table.
        """
        self._check(labels_b)
        group_parts = self.mesh.group_parts(list(parts))
        assert len(features_bD) == len(labels_b) == group_parts[self.mesh.shard], "not this rank's part of the batch"
        none_b0 = features_bD.new_zeros(len(features_bD), 0)
        guides_bE, locals_bK = (none_b0 if extra is None else extra for extra in (guides_bE, locals_bK))
        assert locals_bK.shape[1] == len(self.local_losses)
        losses_L: Tensor = ShardedLosses.apply(  # type: ignore[no-untyped-call]
            features_bD, locals_bK, guides_bE, labels_b, self, max(parts), step, window
        )
        return losses_L

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
        all_B = (labels_B != NOT_HERE).sum()
        known_H = torch.stack([(head.columns_of(labels_B) != NOT_HERE).sum() for head in self.heads])
        if self.mesh.shard_group is not None:
            dist.all_reduce(known_H, group=self.mesh.shard_group)
        counts = [_counted(head, known, all_B) for head, known in zip(self.heads, known_H, strict=True)]
        counts += [all_B] * (len(self.batch_losses) + len(self.local_losses))
        return Window(self._select(labels_B, step), torch.stack(counts))

    def selection(self, labels_B: Tensor, longest: int, step: int) -> Selection:
        """The prototypes of a step whose shard group has the samples `labels_B`. Collective if it samples."""
        if self.config.sample_rate < 1:
            labels_B = self._over_replicas(labels_B, longest)
        return self._select(labels_B, step)

    def take(self, second_pass: Callable[[Sink], None], columns: Tensor | None, weight_KD: Tensor) -> None:
        """Backward's pass for the gradient of the prototypes that took part: do it, or keep it back."""
        if self.fused:
            self._kept_back = second_pass, columns
        else:
            second_pass(self.gradient.sink(columns, weight_KD))

    def spend(self, update: Callable[[Columns, Tensor], None]) -> None:
        """Hand the gradient that backward kept back to `update`, tile by tile; the prototypes must not have moved."""
        assert self._kept_back is not None, "no backward yet"
        (second_pass, columns), self._kept_back = self._kept_back, None

        def spent(first: int, gradient_TD: Tensor) -> None:
            with part("optimiser"):
                update(span(columns, first, len(gradient_TD)), gradient_TD)

        with part("classifier"):
            second_pass(spent)

    def forget(self) -> None:
        """Give up an update: nothing of its batches is left."""
        self._kept_back = None
        self.gradient.clear()
        self.followers.forget()

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


def _counted(head: Head, known: Tensor, samples: Tensor) -> Tensor:
    """How many samples count for a head, of which it knows the identities of some."""
    if isinstance(head.objective, Distil):
        return samples - known if head.objective.unknown_only else samples
    return known
