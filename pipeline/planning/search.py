"""The cheapest setting that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.model.backbone_cost import BackboneCost, count_backbone
from pipeline.planning.calibration import Rates
from pipeline.planning.config import GIB, MOST_GPUS, SAMPLE_RATES, PlanConfig, Setting
from pipeline.planning.memory import memory_of
from pipeline.planning.speed import seconds_of, traffic_of


@dataclass(frozen=True)
class Estimate:
    """What a step of one setting takes of each GPU.

    Attributes:
        memory: bytes by item.
        traffic: bytes received by item.
        seconds: by item.
        batch: samples of a step, over all GPUs.
        available: bytes of a GPU.
    """

    setting: Setting
    memory: dict[str, int]
    traffic: dict[str, float]
    seconds: dict[str, float]
    batch: int
    available: float

    @property
    def memory_bytes(self) -> int:
        """All of the memory."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """All of the time."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.memory_bytes <= self.available

    @property
    def gpu_seconds_per_sample(self) -> float:
        """The cost."""
        return self.setting.ranks * self.step_seconds / self.batch


@dataclass(frozen=True)
class CapacityPlan:
    """What was found.

    Attributes:
        alternatives: for each number of ranks and sample rate, the best class group.
        chosen: the cheapest that fits.
        unsampled: the cheapest that fits with all rows in every softmax; None where there is none.
    """

    config: PlanConfig
    rates: Rates
    backbone: BackboneCost
    alternatives: tuple[Estimate, ...]
    chosen: Estimate
    unsampled: Estimate | None


def make_plan(config: PlanConfig, rates: Rates) -> CapacityPlan:
    """Search ranks, sample rates and class groups.

    Raises:
        ConfigError: nothing fits, or the backbone cannot be built.
    """
    backbone = count_backbone(config.backbone)
    alternatives = tuple(find_alternatives(config, backbone, rates))
    chosen = _cheapest(alternatives)
    if chosen is None:
        raise ConfigError(nothing_fits(config, backbone, rates, alternatives))
    unsampled = _cheapest(tuple(one for one in alternatives if one.setting.sample_rate == 1))
    return CapacityPlan(config, rates, backbone, alternatives, chosen, unsampled)


def estimate(config: PlanConfig, setting: Setting, backbone: BackboneCost, rates: Rates) -> Estimate:
    """Memory, traffic and time of one setting."""
    return Estimate(
        setting,
        memory_of(config, setting, backbone, rates),
        traffic_of(config, setting, backbone),
        seconds_of(config, setting, backbone, rates),
        config.batch,
        config.memory_bytes,
    )


def find_alternatives(config: PlanConfig, backbone: BackboneCost, rates: Rates) -> Iterator[Estimate]:
    """For each number of ranks and sample rate the fastest class group that fits, or the smallest if none does."""
    for ranks in _rank_counts(config):
        if _class_groups(config, ranks):
            for rate in SAMPLE_RATES if config.sample_rate is None else (config.sample_rate,):
                yield best_of(config, ranks, rate, backbone, rates)


def best_of(config: PlanConfig, ranks: int, rate: float, backbone: BackboneCost, rates: Rates) -> Estimate:
    """The fastest class group of so many ranks that fits, or the smallest if none does."""
    groups = _class_groups(config, ranks)
    found = [estimate(config, Setting(ranks, group, rate), backbone, rates) for group in groups]
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: (one.step_seconds, one.memory_bytes))
    return min(found, key=lambda one: one.memory_bytes)


def _rank_counts(config: PlanConfig) -> list[int]:
    """Powers of two up to all GPUs, and all of them."""
    return sorted({1 << power for power in range(config.gpus.bit_length())} | {config.gpus})


def _class_groups(config: PlanConfig, ranks: int) -> list[int]:
    """Divisors of the ranks, or of these the one that is asked for or has to be."""
    if config.implementation == "eager" or config.fused_update:
        return [ranks] if config.class_group in (None, ranks) else []
    return [n for n in range(1, ranks + 1) if ranks % n == 0 and config.class_group in (None, n)]


def _cheapest(estimates: tuple[Estimate, ...]) -> Estimate | None:
    return min((one for one in estimates if one.fits), key=lambda one: one.gpu_seconds_per_sample, default=None)


def nothing_fits(config: PlanConfig, backbone: BackboneCost, rates: Rates, tried: tuple[Estimate, ...]) -> str:
    """Tell by how much, and the first change that would do."""
    closest = min(tried, key=lambda one: one.memory_bytes)
    need, setting = closest.memory_bytes / GIB, closest.setting
    changes = (
        words
        for words, changed in _changes(config)
        if any(one.fits for one in find_alternatives(changed, backbone, rates))
    )
    change = next(changes, "use GPUs with more memory, a smaller --batch or a smaller --backbone")
    return (
        f"nothing fits: the smallest setting (--gpus {setting.ranks} --class-group {setting.class_group} "
        f"--sample-rate {setting.sample_rate:g}) needs {need:.1f} GiB a GPU, {need - config.gpu_memory:.1f} GiB more "
        f"than there is: {change}"
    )


def _changes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    if config.sample_rate is not None:
        yield "leave --sample-rate out", config.model_copy(update={"sample_rate": None})
    if config.class_group is not None:
        yield "leave --class-group out", config.model_copy(update={"class_group": None})
    if config.fused_update is False:
        yield "leave --no-fused-update out", config.model_copy(update={"fused_update": None})
    if config.implementation == "eager":
        yield "use --implementation ours", config.model_copy(update={"implementation": "ours", "class_group": None})
    gpus = 2 * config.gpus
    while gpus <= min(config.batch, MOST_GPUS):
        yield f"use --gpus {gpus}", config.model_copy(update={"gpus": gpus})
        gpus *= 2
