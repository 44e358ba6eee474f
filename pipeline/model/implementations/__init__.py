"""The passes of a batch over a rank's prototypes, in three implementations behind one interface."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.model.heads import HeadBatch, Scan

Name = Literal["auto", "dense", "blocked", "triton"]
Precision = Literal["fp32", "bf16"]

# Takes the gradient of prototypes [first, first + T) as (T, D); the tensor is the caller's again afterwards.
Sink = Callable[[int, Tensor], None]


class Implementation(Protocol):
    """How a rank's prototypes are passed over."""

    def scan(self, batch: HeadBatch) -> Scan:
        """First pass: softmax statistics, and the sum that becomes the feature gradient."""

    def weight_gradient(
        self, batch: HeadBatch, scan: Scan, log_sum_exp_B: Tensor, weight_B: Tensor, sink: Sink
    ) -> None:
        """Second pass: hand the gradient of sum_b weight_b * loss_b by this rank's prototypes to `sink`.

        Every prototype once, in ascending spans. A span's prototypes are not read again after its gradient is handed
        over, so that `sink` may change them.
        """


def choose(name: Name, precision: Precision, device: torch.device) -> Implementation:
    """The implementation for a device.

    Raises:
        ConfigError: it cannot run there.
    """
    from pipeline.model.implementations.blocked import Blocked
    from pipeline.model.implementations.dense import Dense

    there = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if device.type == "cuda" and there else "blocked"
    if precision == "bf16" and name != "triton":
        raise ConfigError(
            f"classifier.precision 'bf16' needs the triton implementation, not {name!r} on {device.type}; take 'fp32'"
        )
    if name != "triton":
        return Dense() if name == "dense" else Blocked()
    if not there:
        raise ConfigError("classifier.implementation 'triton' needs the package triton: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "classifier.implementation 'triton' needs a GPU; take 'auto' (or, to test, TRITON_INTERPRET=1)"
        )
    from pipeline.model.implementations.triton_tiles import TritonTiles

    return TritonTiles(torch.bfloat16 if precision == "bf16" else torch.float32)
