"""Bytes that a step sends and seconds that it takes, item by item.

A step is a chain: what runs beneath something else is counted only as far as it sticks out. `docs/planning.md` has
the formulas and names what is assumed.
"""

from __future__ import annotations

from pipeline.model.backbone_cost import BackboneCost
from pipeline.model.flops import flops_of
from pipeline.model.heads import STATISTICS
from pipeline.planning.calibration import Rates
from pipeline.planning.config import PlanConfig, Setting, Share
from pipeline.planning.memory import FP32, INT64, OPTIMISER_SLOTS

# Items of `seconds_of` in which a GPU waits for others.
WAITING = (
    "gather of features",
    "softmax statistics",
    "feature gradients",
    "row gradients of replicas",
    "backbone gradients",
    "agreement",
)
BACKWARD_SHARE = 2 / 3  # of a training pass: the gradients of the inputs, and those of the weights
HASH_BYTES = 29 * 2 * INT64  # a row: pipeline/model/sampling.py reads and writes so many int64 tensors of it
AGREEMENTS = 2  # small sums over all ranks: are the losses finite, and the gradient's norm


def traffic_of(config: PlanConfig, setting: Setting, backbone: BackboneCost) -> dict[str, float]:
    """Bytes by item that one GPU receives (or sends: collectives by rings do as much of both) in a step.

    Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005: a gather
    or reduce-scatter among n moves (n - 1) / n of the whole, an all-reduce is one of each; for ZeRO 3, Rajbhandari et
    al., "ZeRO", SC 2020, section 7.2.2: half as much again. So do stages 1 and 2 here: DeepSpeed 0.19.8 sums the whole
    gradient on every rank before it keeps a part, and gathers the weights after the update.
    """
    share = Share.of(config, setting)
    of_group, of_replicas, of_ranks = (1 - 1 / n for n in (setting.class_group, setting.replicas, setting.ranks))
    sizes = _sizes(config, setting, share, backbone)
    return {
        "features and labels": of_group * sizes["features and labels"],
        "softmax statistics": of_group * sizes["softmax statistics"],
        "feature gradients": of_group * sizes["feature gradients"],
        "row gradients of replicas": 2 * of_replicas * sizes["row gradients"],
        "backbone": (2 if config.zero_stage == 0 else 3) * of_ranks * sizes["backbone"],
    }


def seconds_of(config: PlanConfig, setting: Setting, backbone: BackboneCost, rates: Rates) -> dict[str, float]:
    """Seconds by item that a step is longer for; they add up to the step."""
    share = Share.of(config, setting)
    new = (share.sampled_rows, config.dim)
    flops = flops_of(backbone.forward_flops, share.samples, share.group_batch, new, share.parents)
    work = {
        "backbone": flops["backbone"] / (rates.matmul_flops * rates.backbone_fraction),
        "sampling": _sampling_bytes(config, setting, share, rates) / rates.copy_bytes,
        "classifier": flops["classifier"] / rates.classifier_flops,
        "parents": flops["parents"] / rates.classifier_flops,
        "row update": _update_bytes(config, share) * _not_measured(share, rates) / rates.copy_bytes,
    }
    step = work | _waiting(config, setting, share, backbone, work)
    return step | {
        "loader": _loader_stall(config, share, sum(step.values())),
        "checkpoint": _checkpoint_stall(config, share, backbone),
    }


def _sizes(config: PlanConfig, setting: Setting, share: Share, backbone: BackboneCost) -> dict[str, float]:
    """Bytes of what each collective brings together."""
    statistics = setting.class_group * (1 + len(share.parents)) * share.group_batch * FP32 * STATISTICS
    return {
        "features and labels": share.group_batch * (FP32 * config.dim + INT64),
        "softmax statistics": statistics,
        "feature gradients": share.group_batch * FP32 * config.dim,
        "row gradients": FP32 * config.dim * share.sampled_rows,
        "backbone": FP32 * backbone.parameters,
    }


def _waiting(
    config: PlanConfig, setting: Setting, share: Share, backbone: BackboneCost, work: dict[str, float]
) -> dict[str, float]:
    """Seconds of the collectives, less what runs beneath computation."""
    links, group, sizes = config.links, setting.class_group, _sizes(config, setting, share, backbone)
    second_pass = 0.0 if share.fused or config.implementation == "eager" else work["classifier"] / 2
    backbone_part = links.gather(setting.ranks, sizes["backbone"])
    # Gradients travel beneath backward, and so do ZeRO 3's weights; those of stages 1 and 2 come after the update.
    beneath, after = {0: (2, 0), 1: (2, 1), 2: (2, 1), 3: (3, 0)}[config.zero_stage]
    backward = config.hidden_share * BACKWARD_SHARE * work["backbone"]
    return {
        "gather of features": links.gather(group, sizes["features and labels"]),
        "softmax statistics": links.gather(group, sizes["softmax statistics"]),
        "feature gradients": max(0.0, links.gather(group, sizes["feature gradients"]) - second_pass),
        "row gradients of replicas": links.all_reduce(setting.replicas, sizes["row gradients"], stride=group),
        "backbone gradients": max(0.0, beneath * backbone_part - backward) + after * backbone_part,
        "agreement": AGREEMENTS * links.all_reduce(setting.ranks, FP32),
    }


def _loader_stall(config: PlanConfig, share: Share, step: float) -> float:
    """What decoding a batch takes longer than the step beneath which it happens."""
    if config.loader_images_per_s is None:
        return 0.0
    return max(0.0, share.samples / config.loader_images_per_s - step)


def _checkpoint_stall(config: PlanConfig, share: Share, backbone: BackboneCost) -> float:
    """The copy that a checkpoint is written from, spread over the steps between two: rows, backbone, optimisers."""
    if config.checkpoint_every is None:
        return 0.0
    numbers = config.dim * share.rows + backbone.parameters
    size = FP32 * (1 + OPTIMISER_SLOTS[config.optimiser]) * numbers
    return size / (config.checkpoint_bandwidth * 1e9) / config.checkpoint_every


def _sampling_bytes(config: PlanConfig, setting: Setting, share: Share, rates: Rates) -> float:
    """Choosing the step's rows and copying them. Public code: fitted. Here: hashes of all rows, a copy of the chosen
    ones, and twice what the update moves of them, as they do not lie together.
    """
    if setting.sample_rate == 1:
        return 0.0
    if config.implementation == "eager":
        return rates.eager_row_bytes * share.rows
    copies = 2 * FP32 * config.dim * (1 + 2 * (1 + OPTIMISER_SLOTS[config.optimiser]))
    return HASH_BYTES * share.rows + copies * share.sampled_rows


def _update_bytes(config: PlanConfig, share: Share) -> int:
    """Weights, optimiser slots and, unless fused, gradients: each read once and written once."""
    tensors = 1 + OPTIMISER_SLOTS[config.optimiser] + (0 if share.fused else 1)
    return 2 * FP32 * tensors * config.dim * share.sampled_rows


def _not_measured(share: Share, rates: Rates) -> float:
    """Share of the update that the benchmark's step has not counted already.

    The benchmark updated its rows once in `rates.batch` samples; with fewer a step, the update weighs more.
    """
    return 1.0 if rates.batch is None else max(0.0, 1 - share.group_batch / rates.batch)
