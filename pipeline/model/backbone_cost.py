"""What a backbone costs, counted on torch's meta device: shapes without numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError
from pipeline.model.backbones import BackboneConfig, build_backbone

_SAMPLES = 2  # a batch norm in training mode refuses one


@dataclass(frozen=True)
class BackboneCost:
    """Counts of one backbone.

    Attributes:
        parameters: how many numbers.
        activations: numbers that a sample leaves for backward: the outputs of all leaf modules.
        forward_flops: of a sample's forward pass, two a multiply-add; training takes three times as many.
    """

    parameters: int
    activations: int
    forward_flops: int


def count_backbone(config: BackboneConfig) -> BackboneCost:
    """Build the backbone without memory and run it without arithmetic.

    Raises:
        ConfigError: it cannot be built, or not run, on the meta device.
    """
    activations = 0

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations
        is_new = output._base is None and all(output is not given for given in inputs)  # views take no memory
        activations += output.numel() if is_new else 0

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
            backbone = build_backbone(config)
            for module in backbone.modules():
                if not any(True for _ in module.children()):
                    module.register_forward_hook(add)
            backbone(torch.empty(_SAMPLES, *backbone.image_shape))
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {config.name!r} cannot be counted on the meta device: {reason}") from None
    return BackboneCost(
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        activations=activations // _SAMPLES,
        forward_flops=flops.get_total_flops() // _SAMPLES,
    )
