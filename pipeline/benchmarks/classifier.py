"""One training step of the classifier, ours and the public way, side by side: time, memory, shares of ceilings."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.benchmarks.eager import MOMENTUM, RATE, EagerClassifier
from pipeline.benchmarks.measure import ceilings, free_bytes, machine, peak_extra_bytes, seconds
from pipeline.errors import ConfigError
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.implementations import Name, Precision
from pipeline.model.margins import MarginConfig
from pipeline.schema import Config
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.row_optimiser import RowOptimiser

MARGIN = MarginConfig(name="cosface", scale=64.0, m3=0.35)
FILL_ROWS = 1 << 16  # random rows made at once
PHASES = ("forward", "backward", "update")
# What `eager` takes beside weights and momentum, in weights: a first guess, to refuse what cannot fit.
EAGER_WEIGHTS, EAGER_LOGITS = 3, 4


class ClassifierBenchmark(Config):
    """What is measured."""

    classes: int = Field(1_000_000, ge=2, description="identities of the new classifier")
    dim: int = Field(128, ge=1, description="of an embedding")
    batch: int = Field(128, ge=1, description="samples of a step")
    parents: int = Field(0, ge=0, description="frozen classifiers alongside")
    parent_classes: int | None = Field(None, ge=1, description="identities of each; none: as many as the new one")
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the prototypes in a step")
    implementation: Name = Field("auto", description="dense, blocked, triton, or by the device")
    precision: Precision = Field("fp32", description="of the tiles (bf16: triton)")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where")
    eager: bool = Field(True, description="measure the public way too")
    fused: bool = Field(True, description="update tile by tile, after backward")
    threads: int = Field(os.cpu_count() or 1, ge=1, description="processor threads")
    repeats: int = Field(5, ge=1, description="steps of each, after one that is not counted; medians are told")


@dataclass
class Step:
    """One training step in its phases."""

    forward: Callable[[int], Tensor]
    update: Callable[[], None]

    def run(self, number: int, device: torch.device) -> list[float]:
        """Seconds of forward, backward and update."""
        losses: list[Tensor] = []
        times = [seconds(lambda: losses.append(self.forward(number)), device)]
        times.append(seconds(lambda: losses.pop().backward(), device))
        return [*times, seconds(self.update, device)]


def measure_classifier(config: ClassifierBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to measure.
        progress: told what is being done.

    Returns:
        What goes into the JSON file; `docs/classifier.md` explains the keys.

    Raises:
        ConfigError: it does not fit into memory, or the implementation cannot run here.
    """
    device = torch.device(config.device)
    torch.set_num_threads(config.threads)
    _check(config, device)
    progress("warming up")
    small = config.model_copy(update={"classes": 64, "parent_classes": 64})
    for step in _steps(small, device)[1].values():
        step.run(0, device)
    progress(f"making {config.classes:,} prototypes")
    name, steps = _steps(config, device)
    extra = {}
    for kind in [kind for kind in steps if kind != "probe"]:
        progress(f"memory of {kind}")
        extra[kind] = peak_extra_bytes(partial(steps[kind].run, 0, device), device)
    times: dict[str, list[list[float]]] = {kind: [] for kind in steps}
    for number in range(config.repeats + 1):
        progress(f"step {number} of {config.repeats}")
        steps[name].run(number, device)  # not counted: after eager has given back its gigabytes, the next one is slow
        for kind, step in steps.items():  # side by side: what disturbs one disturbs the other
            times[kind].append(step.run(number, device))
    progress("ceilings of the machine")
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return _result(config, name, extra, {kind: runs[1:] for kind, runs in times.items()}, ceilings(device, precision))


def _check(config: ClassifierBenchmark, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU here; take --device cpu")
    row, held = 4 * config.dim, config.classes * (2 + (0 if config.fused else 1))
    held += config.parents * (config.parent_classes or config.classes)
    logits = 4 * config.batch * config.classes * config.sample_rate
    eager = EAGER_WEIGHTS * config.classes * row * config.sample_rate + EAGER_LOGITS * logits if config.eager else 0
    if (needed := held * row + int(eager)) > (free := free_bytes(device)):
        hint = "--no-eager leaves the largest part out" if config.eager else "lower --classes, --dim or --parents"
        raise ConfigError(
            f"this takes about {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} GB are free; {hint}"
        )


def _steps(config: ClassifierBenchmark, device: torch.device) -> tuple[str, dict[str, Step]]:
    """Name of our implementation, and the steps: it, `probe` with other parents than asked for, and `eager`.

    All of them train the same weights with the same momentum: there is no memory for two.
    """
    features_BD = torch.randn(config.batch, config.dim, device=device, requires_grad=True)
    parents = [_random_rows(config.parent_classes or config.classes, config.dim, device) for _ in range(config.parents)]
    settings = ClassifierConfig(
        implementation=config.implementation, precision=config.precision, sample_rate=config.sample_rate
    )
    classifier = ShardedClassifier("new", config.classes, config.dim, MARGIN, config=settings, device=device)
    rows = RowOptimiser(classifier.weight_CD, OptimiserConfig(name="sgd", momentum=MOMENTUM))
    heads = [Head("parent", rows_CD, range(len(rows_CD)), MARGIN) for rows_CD in parents]
    # With no parent asked for, what one costs is measured by one that shares the new one's memory; else without any.
    probe = [] if heads else [classifier.heads[0]]
    name = type(classifier.implementation).__name__.lower().removesuffix("tiles")
    steps = {
        name: _our_step(classifier, rows, heads, features_BD, config),
        "probe": _our_step(classifier, rows, probe, features_BD, config),
    }
    if config.eager:
        eager = EagerClassifier(
            classifier.weight_CD, rows.slots["momentum_buffer"], MARGIN, parents, config.sample_rate
        )
        steps["eager"] = Step(
            lambda number: eager.forward(features_BD, _labels(config, number, device), number), eager.update
        )
    return name, steps


def _our_step(
    classifier: ShardedClassifier,
    rows: RowOptimiser,
    heads: list[Head],
    features_BD: Tensor,
    config: ClassifierBenchmark,
) -> Step:
    def forward(number: int) -> Tensor:
        classifier.parents = tuple(heads)
        classifier.fused = config.fused
        labels_B = _labels(config, number, features_BD.device)
        return classifier(features_BD, labels_B, [config.batch], number).sum()

    def update() -> None:
        if config.fused:
            classifier.spend(partial(rows.apply, rate=RATE))
        else:
            rows.step(classifier.gradient.columns, classifier.gradient.total(None), RATE)
            classifier.gradient.clear()

    return Step(forward, update)


def _random_rows(rows: int, dim: int, device: torch.device) -> Tensor:
    weight_CD = torch.empty(rows, dim, device=device)
    for part in torch.split(weight_CD, FILL_ROWS):
        part.normal_(std=0.01)
    return weight_CD


def _labels(config: ClassifierBenchmark, number: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(config.classes, (config.batch,), generator=generator).to(device)


def _result(
    config: ClassifierBenchmark,
    name: str,
    extra: dict[str, int],
    times: dict[str, list[list[float]]],
    ceiling: dict[str, float],
) -> dict[str, Any]:
    shown = [kind for kind in times if kind != "probe"]
    all_ms = {kind: [sum(run) * 1e3 for run in runs] for kind, runs in times.items()}
    step_ms = {kind: statistics.median(runs) for kind, runs in all_ms.items()}
    phases = {
        f"{phase}_ms": {kind: statistics.median(run[index] for run in times[kind]) * 1e3 for kind in shown}
        for index, phase in enumerate(PHASES)
    }
    weight_bytes, per_second = 4 * config.classes * config.dim, 1e3 / step_ms[name]
    flops, moved = _work(config)
    return {
        "benchmark": "classifier",
        **config.model_dump(exclude={"implementation", "eager"}),
        "implementation": name,
        "machine": machine(torch.device(config.device)),
        "step_ms": {kind: step_ms[kind] for kind in shown},
        **phases,
        "step_ms_all": {kind: all_ms[kind] for kind in shown},
        "weight_bytes": weight_bytes,
        "extra_bytes": extra,
        "ratio_step": step_ms[name] / step_ms["eager"] if config.eager else None,
        "ratio_extra": extra[name] / extra["eager"] if config.eager else None,
        "extra_over_weights": extra[name] / weight_bytes,
        "parent_over_new": _parent_over_new(config, all_ms[name], all_ms["probe"]),
        "ceilings": ceiling,
        "flops_per_s": flops * per_second,
        "bytes_per_s": moved * per_second,
        "fraction_of_matmul": flops * per_second / ceiling["matmul_flops"],
        "fraction_of_copy": moved * per_second / ceiling["copy_bytes"],
    }


def _work(config: ClassifierBenchmark) -> tuple[float, float]:
    """Operations and bytes of a step: four products over the new prototypes and two over each parent's; the new ones
    read by both passes and written, their momentum read and written, the parents' read once.
    """
    new = config.classes * config.sample_rate * config.dim
    old = config.parents * (config.parent_classes or config.classes) * config.dim
    return 8 * config.batch * new + 4 * config.batch * old, 4 * (5 * new + old)


def _parent_over_new(config: ClassifierBenchmark, step_ms: list[float], probe_ms: list[float]) -> float:
    """What a parent of as many classes costs, in steps without one: median over the rounds, whose steps are paired."""
    laden, bare = (step_ms, probe_ms) if config.parents else (probe_ms, step_ms)
    parent_classes = (config.parent_classes or config.classes) if config.parents else config.classes
    ratio = statistics.median(a / b - 1 for a, b in zip(laden, bare, strict=True))
    return ratio / max(1, config.parents) * config.classes / parent_classes
