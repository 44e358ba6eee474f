"""Bytes that a step sends and seconds that it takes, item by item; nothing is assumed to overlap."""

from __future__ import annotations

from pipeline.model.heads import STATISTICS
from pipeline.planning.backbone import BackboneCost
from pipeline.planning.calibration import Rates
from pipeline.planning.config import PlanConfig, Setting, Share
from pipeline.planning.flops import flops_of
from pipeline.planning.memory import FP32, INT64, OPTIMISER_SLOTS


def traffic_of(config: PlanConfig, setting: Setting, backbone: BackboneCost) -> dict[str, float]:
    """Bytes by item that one GPU receives (or sends: collectives by rings do as much of both) in a step.

    Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005: a gather
    or reduce-scatter among n moves (n - 1) / n of the whole, an all-reduce is one of each; for ZeRO 3, Rajbhandari et
    al., "ZeRO", SC 2020, section 7.2.2: half as much again.
    """
    share = Share.of(config, setting)
    of_group, of_replicas, of_ranks = (1 - 1 / n for n in (setting.class_group, setting.replicas, setting.ranks))
    heads = 1 + len(share.parents)
    statistics = setting.class_group * heads * share.group_batch * FP32 * STATISTICS
    return {
        "features and labels": of_group * share.group_batch * (FP32 * config.dim + INT64),
        "softmax statistics": of_group * statistics,
        "feature gradients": of_group * share.group_batch * FP32 * config.dim,
        "row gradients of replicas": 2 * of_replicas * FP32 * config.dim * share.sampled_rows,
        "backbone": (3 if config.zero_stage == 3 else 2) * of_ranks * FP32 * backbone.parameters,
    }


def seconds_of(config: PlanConfig, setting: Setting, backbone: BackboneCost, rates: Rates) -> dict[str, float]:
    """Seconds by item of a step."""
    share = Share.of(config, setting)
    new = (share.sampled_rows, config.dim)
    flops = flops_of(backbone.forward_flops, share.samples, share.group_batch, new, share.parents)
    return {
        "backbone": flops["backbone"] / (rates.matmul_flops * config.backbone_efficiency),
        "classifier": flops["classifier"] / rates.classifier_flops,
        "parents": flops["parents"] / rates.classifier_flops,
        "row update": _update_bytes(config, share) * _not_measured(share, rates) / rates.copy_bytes,
        "communication": sum(traffic_of(config, setting, backbone).values()) / (config.bandwidth * 1e9),
    }


def _update_bytes(config: PlanConfig, share: Share) -> int:
    """Weights, optimiser slots and, unless fused, gradients: each read once and written once."""
    tensors = 1 + OPTIMISER_SLOTS[config.optimiser] + (0 if share.fused else 1)
    return 2 * FP32 * tensors * config.dim * share.sampled_rows


def _not_measured(share: Share, rates: Rates) -> float:
    """Share of the update that the benchmark's step has not counted already.

    The benchmark updated its rows once in `rates.batch` samples; with fewer a step, the update weighs more.
    """
    return 1.0 if rates.batch is None else max(0.0, 1 - share.group_batch / rates.batch)
