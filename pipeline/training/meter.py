"""How fast a rank trains and where its time goes, told every `log_every` steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.model.backbone_cost import count_backbone
from pipeline.model.flops import flops_of
from pipeline.parts import GpuClock, HostClock, Parts, listening
from pipeline.schema import Config
from pipeline.training.profiling import Tracer

if TYPE_CHECKING:  # the trainer asks these
    from pipeline.training.trainer import Trainer

# Dense TFLOP/s of matrix products in bf16 and in fp32 without TF32, by NVIDIA's data sheets; the first that fits.
PEAK_TFLOPS = {
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 67.0),
    "H200": (989.4, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
}

Figures = dict[str, float]


class ObserveConfig(Config):
    """What a training's figures are compared with."""

    peak_tflops: float | None = Field(
        None, gt=0, description="of a rank's device, for MFU; none: of known GPUs their data sheet's, of others no MFU"
    )


@dataclass(frozen=True)
class Telemetry:
    """Where a rank tells what concerns itself alone.

    Attributes:
        tell: takes the steps done and this rank's figures; must not block.
        traces: folder of profiles.
    """

    tell: Callable[[int, Figures], None]
    traces: Path


class Meter:
    """Times the parts of this rank's steps, and traces some of them. A context: while it is open, it listens.

    Args:
        trainer: this rank's part of the run.
        telemetry: where the figures go; None: nowhere, and nothing is timed or traced.
    """

    def __init__(self, trainer: Trainer, telemetry: Telemetry | None) -> None:
        self._trainer, self._telemetry, self._began = trainer, telemetry, time.monotonic()
        self._open = ExitStack()
        if telemetry is None:
            return
        self._parts: Parts[Any] = Parts(GpuClock() if trainer.device.type == "cuda" else HostClock())
        self._tracer = Tracer(trainer.config.profile, self._parts, telemetry.traces, trainer.rank)
        self._flops, self._peak, self._steps = flops_of_step(trainer), peak_flops(trainer), 0

    def __enter__(self) -> Self:
        if self._telemetry is not None:
            self._open.enter_context(listening(self._parts))
            self._open.callback(self._tracer.end)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def begin(self, step: int) -> None:
        """Of a step."""
        if self._telemetry is not None:
            self._tracer.at(step)
            self._steps += 1

    def forget(self) -> None:
        """What came before is no part of the steps to be told of."""
        if self._telemetry is not None:
            self._steps = 0
            self._parts.take()

    def report(self, step: int, more: Figures) -> None:
        """Tell the figures since the last time.

        `time/step` and `time/PART` are seconds of a step, as it was on the average; `flops_per_s` of this rank, and
        `mfu` where its device's peak is known; `checkpoint/age_s`: seconds of work that would be lost now.

        Args:
            step: updates done.
            more: further figures of this rank.
        """
        if self._telemetry is None or not self._steps:
            return
        seconds, steps, self._steps = self._parts.take(), self._steps, 0
        whole = max(sum(seconds.values()), 1e-9)
        figures = {"time/step": whole / steps} | {f"time/{name}": value / steps for name, value in seconds.items()}
        if self._flops is not None:
            figures["flops_per_s"] = self._flops * steps / whole
            if self._peak is not None:
                figures["mfu"] = figures["flops_per_s"] / self._peak
        saved = self._trainer.checkpoints.taken_at
        figures["checkpoint/age_s"] = time.monotonic() - (self._began if saved is None else saved)
        self._telemetry.tell(step, figures | more)


def flops_of_step(trainer: Trainer) -> int | None:
    """Of this rank; None if its backbone cannot be counted."""
    classifier, mesh, rank = trainer.classifier, trainer.mesh, trainer.rank
    try:
        forward = count_backbone(trainer.backbone).forward_flops
    except ConfigError:
        return None
    samples = sum(parts[rank] for parts in trainer.parts)
    rows, dim = classifier.weight_CD.shape
    new = (math.ceil(classifier.config.sample_rate * rows), dim)
    parents = [(head.weight_CD.shape[0], head.weight_CD.shape[1]) for head in classifier.parents]
    return sum(flops_of(forward, samples, trainer.config.global_batch // mesh.replicas, new, parents).values())


def peak_flops(trainer: Trainer) -> float | None:
    """FLOP/s that this rank's device could do, if the config or the device's name says."""
    config = trainer.config
    if config.observe.peak_tflops is not None:
        return config.observe.peak_tflops * 1e12
    if trainer.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(trainer.device)
    known = next((peaks for model, peaks in PEAK_TFLOPS.items() if model in name), None)
    return None if known is None else known[config.engine.precision == "fp32"] * 1e12
