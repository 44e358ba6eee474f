"""The planner against speeds that others measured: what was published, and the constants fitted to some of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from pipeline.model.backbone_cost import BackboneCost, count_backbone
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.calibration import Rates, assumed_rates
from pipeline.planning.config import PlanConfig, Setting
from pipeline.planning.speed import seconds_of

Point = tuple[float, int]  # sample rate, identities

GPUS, BATCH = 8, 1024
# InsightFace, recognition/arcface_torch, README.md, "Speed Benchmark": images/s of 8 V100 of 32 GB, model parallel, and
# Partial FC at a sample rate of 0.1; docs/speed_benchmark.md has R50, mixed precision, a batch of 1024, synthetic data.
# 1 and 2 million are as this project was given them.
SPEEDS: dict[Point, float] = {
    (1.0, 125_000): 4824,
    (1.0, 1_000_000): 3449,
    (1.0, 2_000_000): 2593,
    (1.0, 5_500_000): 1389,
    (0.1, 125_000): 5004,
    (0.1, 1_000_000): 4803,
    (0.1, 2_000_000): 4626,
    (0.1, 5_500_000): 3975,
    (0.1, 16_000_000): 2679,
    (0.1, 29_000_000): 1855,
}
# Further ones, looked at when the model was done: the README's other rows, and the log in docs/speed_benchmark.md.
FURTHER: dict[Point, float] = {
    (1.0, 1_400_000): 3043,
    (0.1, 1_400_000): 4738,
    (0.1, 8_000_000): 3565,
    (1.0, 3_000_000): 2271,
    (0.1, 3_000_000): 5300,
}
FITTED: tuple[Point, ...] = (
    (1.0, 125_000),
    (1.0, 5_500_000),
    (0.1, 29_000_000),
)  # the ends; the other seven: predicted
FREE = ("backbone", "classifier", "sampling")  # items, each with one constant that is its inverse speed


def published_config(identities: int) -> PlanConfig:
    """The published run as the planner sees it: fp16 is "bf16", and torch's DDP sends gradients beneath backward."""
    return PlanConfig(
        identities=identities,
        batch=BATCH,
        backbone=BackboneConfig(name="iresnet50", embedding_dim=512, image_size=112, channels=3),
        gpus=GPUS,
        gpu_memory=32.0,
        gpu="v100-32g",
        implementation="eager",
        optimiser="sgd",
        zero_stage=0,
        overlap=0.5,
    )


def published_items(point: Point, backbone: BackboneCost, rates: Rates) -> dict[str, float]:
    """Predicted seconds of a published run's step by item."""
    rate, identities = point
    return seconds_of(published_config(identities), Setting(GPUS, GPUS, rate), backbone, rates)


def predicted_speed(point: Point, backbone: BackboneCost, rates: Rates) -> float:
    """Predicted images/s of a published run."""
    return BATCH / sum(published_items(point, backbone, rates).values())


def fit(points: Collection[Point], backbone: BackboneCost | None = None) -> Rates:
    """The V100's rates with its three free constants fitted to some of `SPEEDS`, by least squares of relative errors.

    A step is linear in the inverse of each free speed as long as the same items stick out from beneath others: the
    profile's own constants say which do.
    """
    backbone = backbone or count_backbone(published_config(1).backbone)
    start = assumed_rates(published_config(1))
    rows, targets = [], []
    for point in points:
        items, seconds = published_items(point, backbone, start), BATCH / SPEEDS[point]
        known = sum(amount for name, amount in items.items() if name not in FREE)
        rows.append([items[name] / seconds for name in FREE])
        targets.append((seconds - known) / seconds)
    (slower_backbone, slower_classifier, slower_sampling), *_ = np.linalg.lstsq(np.array(rows), np.array(targets))
    return replace(
        start,
        source=f"fitted to {len(targets)} published runs",
        backbone_fraction=start.backbone_fraction / float(slower_backbone),
        fraction_of_matmul=start.fraction_of_matmul / float(slower_classifier),
        eager_row_bytes=start.eager_row_bytes * float(slower_sampling),
    )
