"""The same training on more and more GPUs: as many samples a GPU, the same identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.model.backbone_cost import BackboneCost, count_backbone
from pipeline.planning.calibration import Rates
from pipeline.planning.config import MOST_GPUS, PlanConfig
from pipeline.planning.search import Estimate, best_of, nothing_fits
from pipeline.planning.speed import WAITING


@dataclass(frozen=True)
class ScalePlan:
    """What was found, one estimate for each number of GPUs, with its fastest class group that fits."""

    config: PlanConfig
    rates: Rates
    backbone: BackboneCost
    points: tuple[Estimate, ...]


def scale_plan(config: PlanConfig, rates: Rates, gpus: Sequence[int]) -> ScalePlan:
    """Plan each number of GPUs. Without a sample rate all rows are in the softmax: sampling changes what is learned.

    Raises:
        ConfigError: a number is out of range, nothing fits, or the backbone cannot be built.
    """
    backbone = count_backbone(config.backbone)
    samples = -(-config.batch // config.gpus)
    rate = config.sample_rate or 1.0
    configs = [_on(config, count, samples) for count in sorted(set(gpus))]
    points = tuple(best_of(one, one.gpus, rate, backbone, rates) for one in configs)
    if not any(one.fits for one in points):
        raise ConfigError(nothing_fits(configs[-1], backbone, rates, points))
    return ScalePlan(config, rates, backbone, points)


def _on(config: PlanConfig, gpus: int, samples: int) -> PlanConfig:
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"--scale {gpus} is not a number of GPUs from 1 to {MOST_GPUS}")
    if config.class_group is not None and gpus % config.class_group:
        raise ConfigError(f"--class-group {config.class_group} does not divide --scale {gpus}")
    update = {"gpus": gpus, "batch": samples * gpus}
    if config.implementation == "eager":
        update["class_group"] = gpus
    return config.model_copy(update=update)


def waiting_seconds(one: Estimate) -> float:
    """Of a step, in which a GPU waits for others."""
    return sum(one.seconds[name] for name in WAITING)


def efficiency(one: Estimate) -> float:
    """Speed over that of the same GPUs, each doing the same work without waiting for another."""
    return 1 - waiting_seconds(one) / one.step_seconds


def bound_by(one: Estimate) -> str:
    """The item that takes the most of a step, and how much."""
    name, seconds = max(one.seconds.items(), key=lambda item: item[1])
    return f"{name} {seconds / one.step_seconds:.0%}"
