"""SGD and AdamW over a rank's prototypes, for all of them or for those that a step sampled.

**What a step does not sample does not move**: neither its weights, nor its momentum or moments, nor by weight decay;
AdamW counts the steps of each row, so that its bias correction is that of the updates the row has seen. With every row
sampled both are torch's own optimisers.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.row_gradient import Columns, span
from pipeline.training.optimiser import OptimiserConfig

BLOCK_ROWS = 1 << 16  # updated at once, so that the update needs no further C x D tensor
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class RowOptimiser:
    """The optimiser of (C, D) `weight_CD`, which it changes in place.

    Attributes:
        slots: its state by name, each (C, D), or (C, 1) for AdamW's `steps`.
    """

    def __init__(self, weight_CD: Tensor, config: OptimiserConfig) -> None:
        self.weight_CD, self.config = weight_CD, config
        wide = ("exp_avg", "exp_avg_sq") if config.name == "adamw" else ("momentum_buffer",)
        self.slots = {name: torch.zeros_like(weight_CD) for name in wide}
        if config.name == "adamw":
            self.slots["steps"] = weight_CD.new_zeros(len(weight_CD), 1)

    def step(self, columns: Tensor | None, gradient_KD: Tensor, rate: float) -> None:
        """Update the rows at `columns` (None: all) by their gradient, which is used up."""
        for first in range(0, len(gradient_KD), BLOCK_ROWS):
            part_TD = gradient_KD[first : first + BLOCK_ROWS]
            self.apply(span(columns, first, len(part_TD)), part_TD, rate)

    def apply(self, columns: Columns, gradient_TD: Tensor, rate: float) -> None:
        """Update one tile of rows."""
        rows = {"weight": self.weight_CD[columns]} | {name: slot[columns] for name, slot in self.slots.items()}
        if self.config.name == "adamw":
            _adamw(**rows, gradient=gradient_TD, rate=rate, decay=self.config.classifier_weight_decay)
        else:
            decay, momentum = self.config.classifier_weight_decay, self.config.momentum
            _sgd(**rows, gradient=gradient_TD, rate=rate, decay=decay, momentum=momentum)
        if not isinstance(columns, slice):  # a slice is a view, places are a copy
            self.weight_CD[columns] = rows["weight"]
            for name, slot in self.slots.items():
                slot[columns] = rows[name]


def clip_rows_(gradient_KD: Tensor, largest: float, group: dist.ProcessGroup | None) -> float:
    """Scale the gradient of all ranks' rows down to the norm `largest`, and return the norm before. Collective."""
    square = torch.linalg.vector_norm(gradient_KD, dtype=torch.float64).square()
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = float(square.sqrt())
    gradient_KD.mul_(min(1.0, largest / (norm + 1e-6)))
    return norm


def _sgd(weight: Tensor, momentum_buffer: Tensor, gradient: Tensor, rate: float, decay: float, momentum: float) -> None:
    if decay:
        gradient.add_(weight, alpha=decay)
    weight.add_(momentum_buffer.mul_(momentum).add_(gradient), alpha=-rate)


def _adamw(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, gradient: Tensor, rate: float, decay: float
) -> None:
    """Loshchilov and Hutter, ICLR 2019, Algorithm 2."""
    steps.add_(1)
    weight.mul_(1 - rate * decay)
    exp_avg.lerp_(gradient, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    correction1, correction2 = (1 - torch.exp(steps * math.log(beta)) for beta in (BETA1, BETA2))
    denominator = (exp_avg_sq / correction2).sqrt_().add_(EPSILON)
    weight.addcdiv_(exp_avg / correction1, denominator, value=-rate)
