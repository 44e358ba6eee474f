"""What is done to a gradient on its way back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor as it is; its gradient times `factor`, which may be negative."""
    return cast(Tensor, _Scale.apply(tensor, factor))  # type: ignore[no-untyped-call]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
