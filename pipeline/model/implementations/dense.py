"""The plain reference: all of a rank's logits at once. For tests and small classifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.model.heads import HeadBatch, Scan, inverse_length, through_unit_
from pipeline.model.implementations import Sink


class Dense:
    """B x C logits and a second copy of the prototypes."""

    def scan(self, batch: HeadBatch) -> Scan:
        """First pass, see `Implementation`."""
        inverse_C1 = inverse_length(batch.head.weight_CD, batch.head.margin)
        unit_CD = batch.head.weight_CD * inverse_C1
        logits_BC = batch.head.margin.scale * batch.unit_BD @ unit_CD.T
        logits_BC[batch.here_M, batch.column_B[batch.here_M]] = -torch.inf
        none_B1 = torch.full_like(batch.inverse_B1, torch.finfo(logits_BC.dtype).min)  # of no logits at all
        maximum_B = torch.cat([logits_BC, none_B1], dim=1).amax(dim=1)
        exp_BC = torch.exp(logits_BC - maximum_B[:, None])
        return Scan(maximum_B, exp_BC.sum(dim=1), exp_BC @ unit_CD, inverse_C1)

    def weight_gradient(
        self, batch: HeadBatch, scan: Scan, log_sum_exp_B: Tensor, weight_B: Tensor, sink: Sink
    ) -> None:
        """Second pass, see `Implementation`."""
        head = batch.head
        unit_CD = head.weight_CD * scan.inverse_C1
        error_BC = torch.exp(head.margin.scale * batch.unit_BD @ unit_CD.T - log_sum_exp_B[:, None]) * head.margin.scale
        error_BC[batch.here_M, batch.column_B[batch.here_M]] = batch.own_error(log_sum_exp_B)
        gradient_CD = error_BC.T @ (batch.unit_BD * weight_B[:, None])
        sink(0, through_unit_(gradient_CD, unit_CD, scan.inverse_C1, head.margin))
