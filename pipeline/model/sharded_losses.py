"""The autograd function of a step: every loss forward, every gradient backward, in three collectives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model import collectives
from pipeline.model.mesh import ClassMesh
from pipeline.model.terms import BatchTerm, Gathered, IdentityTerm, LocalTerm, Term, term_of
from pipeline.parts import part

if TYPE_CHECKING:
    from pipeline.model.classifier import ShardedClassifier, Window


class ShardedLosses(torch.autograd.Function):
    """Forward scans the prototypes once, which gives the losses and the feature gradients but for their factors;
    backward passes over the new ones again, for their own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_bD: Tensor,
        locals_bK: Tensor,
        guides_bE: Tensor,
        labels_b: Tensor,
        classifier: ShardedClassifier,
        longest: int,
        step: int,
        window: Window | None,
    ) -> Tensor:
        """Global means of all losses."""
        mesh = classifier.mesh
        with part("gather"):
            batch = gathered(features_bD, locals_bK, guides_bE, labels_b, longest, mesh)
        classifier.followers.see(batch.labels_B, batch.guides_BE, longest)
        selection = window.selection if window else classifier.selection(batch.labels_B, longest, step)
        terms: list[Term] = [term_of(selection.heads[0], batch, classifier.implementation)]
        with part("parents"):
            terms += [term_of(head, batch, classifier.implementation) for head in selection.heads[1:]]
            terms += [BatchTerm(loss, batch) for loss in classifier.batch_losses]
            terms += [LocalTerm(number, batch) for number in range(len(classifier.local_losses))]
        own_KBS = torch.cat([term.statistics() for term in terms])
        with part("exchange"):
            joined_WKBS = collectives.exchange(own_KBS, mesh.shard_group)
        parts = joined_WKBS.split([term.channels for term in terms], dim=1)
        told = [term.losses(part_WKBS) for term, part_WKBS in zip(terms, parts, strict=True)]
        loss_LB, counted_LB = (torch.stack(column) for column in zip(*told, strict=True))
        totals_2L = torch.stack([loss_LB.sum(dim=1), counted_LB.sum(dim=1).to(loss_LB.dtype)])
        if mesh.replica_group is not None:
            dist.all_reduce(totals_2L, group=mesh.replica_group)
        samples_L = (window.samples_L.to(loss_LB.dtype) if window else totals_2L[1]).clamp_min(1)
        ctx.classifier, ctx.columns, ctx.terms, ctx.batch = classifier, selection.columns[0], terms, batch
        ctx.weight_LB = counted_LB / samples_L[:, None]
        return totals_2L[0] / samples_L

    @staticmethod
    def backward(ctx: Any, *loss_gradients_L: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the features, the local losses and, unless they are kept back, the new prototypes."""
        classifier, terms, batch = ctx.classifier, ctx.terms, ctx.batch
        weight_LB = ctx.weight_LB * loss_gradients_L[0][:, None]
        total_BD = torch.zeros_like(batch.features_BD)
        for number, (term, weight_B) in enumerate(zip(terms, weight_LB, strict=True)):
            with part("parents" if number else "classifier"):
                gradient_BD = term.feature_gradient(weight_B)
                total_BD[:, : gradient_BD.shape[1]] += gradient_BD
        with part("reduce"):
            scattered = collectives.ReduceScatter(total_BD, classifier.mesh.shard_group)  # on its way from here
        new = terms[0]
        assert isinstance(new, IdentityTerm)
        second_pass = classifier.implementation.weight_gradient
        second_pass = partial(second_pass, new.batch, new.scan, new.log_sum_exp_B, weight_LB[0])
        classifier.take(second_pass, ctx.columns, new.batch.head.weight_CD)
        own = batch.own
        locals_bK = weight_LB[len(terms) - len(classifier.local_losses) :, own].T
        with part("reduce"):
            own_bD = scattered.wait()[: own.stop - own.start]
        return own_bD, locals_bK, None, None, None, None, None, None


def gathered(
    features_bD: Tensor, locals_bK: Tensor, guides_bE: Tensor, labels_b: Tensor, longest: int, mesh: ClassMesh
) -> Gathered:
    """All that is known of each sample, on every rank, by one collective."""
    columns_bX = torch.cat([features_bD.detach(), guides_bE.detach(), locals_bK.detach()], dim=1)
    columns_BX, labels_B = collectives.gather_batch(columns_bX, labels_b, longest, mesh.shard_group)
    widths = [features_bD.shape[1], guides_bE.shape[1], locals_bK.shape[1]]
    features_BD, guides_BE, locals_BK = (part.contiguous() for part in columns_BX.split(widths, dim=1))
    first = mesh.shard * longest if mesh.shard_group is not None else 0
    return Gathered(features_BD, labels_B, guides_BE, locals_BK, slice(first, first + len(labels_b)))
