"""Bytes that a training step takes of one GPU, item by item."""

from __future__ import annotations

import math

from pipeline.model.backbone_cost import BackboneCost
from pipeline.model.heads import STATISTICS
from pipeline.model.implementations.blocked import tile_rows
from pipeline.model.sampling import most_sampled
from pipeline.planning.calibration import Rates
from pipeline.planning.config import GIB, PlanConfig, Setting, Share

FP32, INT64 = 4, 8  # bytes
HALF_BYTES = {"bf16": 2, "fp32": 4}  # of a matrix product's operands
OPTIMISER_SLOTS = {"adamw": 2, "sgd": 1}

# What arcface_torch's partial_fc_v2 writes in a step under fp16 autocast, every tensor counted as if the allocator
# kept its block to the step's end, and the one-hot labels as if of all samples: an upper bound of what is alive at
# once, whose sum grows as InsightFace's published table does (tests/unit/test_planning.py).
EAGER_ROW_TENSORS = {  # bytes a number, (rows in the softmax) x D
    "row gradient": 4,
    "normalised rows": 4,
    "half rows": 2,
    "half row gradient": 2,
    "normalised rows' gradient": 4,
}
EAGER_LOGIT_TENSORS = {  # bytes a logit, (gathered batch) x (rows in the softmax)
    "half logits": 2,
    "fp32 logits": 4,
    "clamped logits": 4,
    "scaled logits, softmax": 4,
    "one-hot labels": 4,
    "scaled logits' gradient": 4,
    "clamped logits' gradient": 4,
    "half logits' gradient": 2,
}
EAGER_PARENT_ROW_TENSORS = ("normalised rows", "half rows")  # a frozen head has no gradient of rows


def memory_of(config: PlanConfig, setting: Setting, backbone: BackboneCost, rates: Rates) -> dict[str, int]:
    """Bytes by item on the fullest rank, at the fullest moment of a step."""
    share = Share.of(config, setting)
    classifier = _ours(config, setting, share, rates) if config.implementation == "ours" else _eager(config, share)
    return _rows(config, share) | classifier | _backbone(config, setting, share, backbone)


def _rows(config: PlanConfig, share: Share) -> dict[str, int]:
    """What stays from step to step, whatever the implementation."""
    slots = OPTIMISER_SLOTS[config.optimiser] * FP32 * config.dim
    step_count = FP32 if config.optimiser == "adamw" else 0
    return {
        "rows": FP32 * config.dim * share.rows,
        "rows' optimiser": (slots + step_count) * share.rows,
        "parents": sum(FP32 * dim * rows for rows, dim in share.parents),
    }


def _ours(config: PlanConfig, setting: Setting, share: Share, rates: Rates) -> dict[str, int]:
    """Softmax by tiles: rows at the most once more, and buffers that do not grow with the identities."""
    taking_part = rows_in_step(config, setting, share)
    parent_rows = sum(rows for rows, _ in share.parents)
    heads = 1 + len(share.parents)
    return {
        "row gradient": 0 if share.fused else FP32 * config.dim * taking_part,
        "sampled rows": 0 if setting.sample_rate == 1 else FP32 * config.dim * taking_part,
        "inverse lengths": FP32 * (share.rows + parent_rows),
        "row numbers of parents": INT64 * parent_rows,
        "statistics of all ranks": FP32 * STATISTICS * setting.class_group * heads * share.group_batch,
        **_buffers(config, share, rates),
    }


def rows_in_step(config: PlanConfig, setting: Setting, share: Share) -> int:
    """Rows of a rank that a step may use: all, or the random ones and an own identity for each sample."""
    if setting.sample_rate == 1:
        return share.rows
    return min(share.rows, most_sampled(share.rows, setting.sample_rate) + config.batch)


def _buffers(config: PlanConfig, share: Share, rates: Rates) -> dict[str, int]:
    """Tiles and features: as the benchmark measured them, or the sum of the tensors."""
    if rates.extra_bytes is not None:
        assert rates.batch is not None
        assert rates.dim is not None
        larger = max(1.0, share.group_batch / rates.batch) * max(1.0, config.dim / rates.dim)
        return {"buffers, measured": math.ceil(rates.extra_bytes * larger)}
    heads = [(share.rows, config.dim), *share.parents]
    dims = sum(dim for _, dim in heads)
    tile = tile_rows(share.group_batch)
    return {
        "tiles": max(_tile_bytes(config, share, min(rows, tile), dim) for rows, dim in heads),
        "gathered features": (FP32 * config.dim + INT64) * share.group_batch,
        "unit features and pull of each head": 2 * FP32 * dims * share.group_batch,
        "feature gradient": FP32 * config.dim * share.group_batch,
    }


def _tile_bytes(config: PlanConfig, share: Share, rows: int, dim: int) -> int:
    """Logits of a tile, its unit rows as the product takes them, and its gradient in fp32."""
    size = HALF_BYTES[config.precision]
    return size * share.group_batch * rows + (FP32 + size) * dim * rows


def _eager(config: PlanConfig, share: Share) -> dict[str, int]:
    """All logits at once. A parent's head, which the public code lacks, is written out the same way."""
    wide = config.precision == "fp32"
    parent_rows = sum(rows for rows, _ in share.parents)
    parent_numbers = sum(rows * dim for rows, dim in share.parents)
    items = {}
    for name, size in EAGER_ROW_TENSORS.items():
        numbers = config.dim * share.sampled_rows + (parent_numbers if name in EAGER_PARENT_ROW_TENSORS else 0)
        items[name] = 0 if wide and name.startswith("half") else size * numbers
    for name, size in EAGER_LOGIT_TENSORS.items():
        logits = share.group_batch * (share.sampled_rows + parent_rows)
        items[name] = 0 if wide and name.startswith("half") else size * logits
    features = FP32 * (2 * config.dim + sum(dim for _, dim in share.parents)) * share.group_batch
    return items | {"gathered features and gradients": 2 * features + INT64 * share.group_batch}


def _backbone(config: PlanConfig, setting: Setting, share: Share, backbone: BackboneCost) -> dict[str, int]:
    """A replica under ZeRO: stage 1 divides optimiser state, 2 gradients too, 3 weights too."""
    whole = FP32 * backbone.parameters
    part = -(-whole // setting.ranks)
    slots = OPTIMISER_SLOTS[config.optimiser]
    return {
        "backbone weights": part if config.zero_stage >= 3 else whole,
        "backbone gradients": part if config.zero_stage >= 2 else whole,
        "backbone optimiser": slots * (part if config.zero_stage >= 1 else whole),
        "activations": HALF_BYTES[config.precision] * backbone.activations * share.samples,
        "context, NCCL, allocator": math.ceil(config.overhead * GIB),
    }
