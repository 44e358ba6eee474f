"""The optimisers of the backbone and of the classifier's rows, and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.schema import Config


class OptimiserConfig(Config):
    """One optimiser for both the backbone and the classifier."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="sgd has Nesterov's momentum off, as the field does")
    learning_rate: float = Field(2e-3, gt=0, description="at the top of the schedule")
    weight_decay: float = Field(0.05, ge=0, description="of the backbone's matrices; biases and norms have none")
    classifier_weight_decay: float = Field(0.0, ge=0, description="of the classifier's rows")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    clip: float | None = Field(None, gt=0, description="largest norm of the backbone's gradient; none: unlimited")
    classifier_clip: float | None = Field(None, gt=0, description="largest norm of the classifier's own gradient")
    warmup: float = Field(
        0.15, ge=0, lt=1, description="share of the steps over which the rate rises from 4% of its top"
    )


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Rate of step `step` of `steps`: linear warm-up, then half a cosine down to zero. A pure function, so that a
    resumed run needs no scheduler state.
    """
    warm = config.warmup * steps
    if step < warm:
        return config.learning_rate * (0.04 + 0.96 * step / warm)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def build_optimiser(config: OptimiserConfig, groups: Iterable[dict[str, object]]) -> torch.optim.Optimizer:
    """An optimiser at rate 0: nothing moves before the loop sets the rate of its first step."""
    if config.name == "adamw":
        return torch.optim.AdamW(list(groups), lr=0.0)
    return torch.optim.SGD(list(groups), lr=0.0, momentum=config.momentum)


def backbone_groups(backbone: nn.Module, config: OptimiserConfig) -> list[dict[str, object]]:
    """Matrices with weight decay; vectors (biases, norms, slopes) without."""
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimiser.param_groups:
        group["lr"] = rate
