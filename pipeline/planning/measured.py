"""What `jobs/benchmark.py scaling` measured, for the planner and beside what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.model.backbone_cost import BackboneCost
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.calibration import assumed_rates, number, read
from pipeline.planning.config import PlanConfig, Setting
from pipeline.planning.speed import WAITING, seconds_of

MS = 1e3
BACKBONE, CLASSIFIER = "backbone, both ways", "classifier, updates"
PHASES = {BACKBONE: ("forward", "backward"), CLASSIFIER: ("losses", "update")}


def measured_links(path: Path) -> dict[str, float]:
    """Latency (microseconds) and bandwidth (GB/s) within a node, as fields of `PlanConfig`.

    Raises:
        ConfigError: the file cannot be read or lacks them.
    """
    document = read("--scaling", path)
    return {key: number(document, f"links.{key}", path, "scaling") for key in ("latency", "bandwidth")}


def predicted_parts(document: dict[str, Any], world: int) -> dict[str, float]:
    """Predicted milliseconds of a step's parts among `world` processes of the scaling benchmark.

    From one process alone (how long it computes) and two (latency and bandwidth of a gather) to any number: processes
    beyond the cores share them, and everything takes so much longer, messages too, which cores copy.
    """
    alone = document["alone_parts_ms"]["1"]
    sharing = max(1.0, world / document["machine"]["cores"])
    # The classifier sees the images of all ranks, twice: in "losses", and in the update's second pass, which is fused.
    scan, update = alone["losses"], max(0.0, alone["update"] - alone["losses"])
    work = {
        BACKBONE: sum(alone[phase] for phase in PHASES[BACKBONE]),
        CLASSIFIER: 2 * scan * world + update,
    }
    config = _config(document, world)
    cost = BackboneCost(parameters=document["parameters"], activations=0, forward_flops=0)
    seconds = seconds_of(config, Setting(world, world, 1.0), cost, assumed_rates(config))
    return {name: sharing * ms for name, ms in (work | {name: MS * seconds[name] for name in WAITING}).items()}


def measured_parts(document: dict[str, Any], world: int) -> dict[str, float]:
    """The same parts as they were measured; what a rank waits for a later one is in its collectives."""
    parts = document["parts_ms"][str(world)]
    work = {name: sum(parts[phase] for phase in phases) for name, phases in PHASES.items()}
    return work | {name: parts.get(name, 0.0) for name in WAITING}


def _config(document: dict[str, Any], world: int) -> PlanConfig:
    backbone = BackboneConfig(
        name=document["backbone"], embedding_dim=document["dim"], image_size=document["size"], channels=3
    )
    return PlanConfig(
        identities=world * document["rows"],
        batch=world * document["batch"],
        backbone=backbone,
        gpus=world,
        gpu_memory=1.0,
        optimiser="sgd",
        precision="fp32",
        zero_stage=document["zero_stage"],
        gpus_per_node=world,
        overlap=0.0,
        **document["links"],
    )
