"""Weak scaling: a training step of more and more processes, beside the same processes that never wait for each other.

Each rank keeps its number of images and of prototypes. On a machine with fewer cores than processes a step takes longer
all the same; what is told is the ratio to processes that do the same work at the same time without communication
(`pipeline/benchmarks/alone.py`). Both crews take turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from pipeline.benchmarks.alone import join_nobody
from pipeline.benchmarks.collective_clock import CollectiveClock
from pipeline.benchmarks.crew import Crew
from pipeline.benchmarks.measure import GIB, free_bytes, machine
from pipeline.compat.methods.bct import Bct
from pipeline.errors import ConfigError
from pipeline.identities import IdentityTable
from pipeline.model.backbone_cost import count_backbone
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.margins import MarginConfig
from pipeline.schema import Config
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import Trainer, TrainingConfig

Told = dict[str, float]

CPU = torch.device("cpu")
RANK_BYTES = GIB // 2  # of a process before it holds anything
SHORT, LONG = 1 << 10, 1 << 24  # bytes of the gathers that latency and bandwidth are taken from
LINK_REPEATS = 9
MICRO, GIGA = 1e6, 1e9


class ScalingBenchmark(Config):
    """What is measured."""

    workers: int = Field(4, ge=1, description="processes at most; measured are 1, 2, 4 ... of them")
    batch: int = Field(8, ge=2, description="images of a rank in a step")
    rows: int = Field(50_000, ge=1, description="identities whose prototypes a rank holds")
    dim: int = Field(128, ge=2, description="of an embedding")
    backbone: str = Field("iresnet18", description="by name")
    size: int = Field(64, ge=8, description="side of the images, pixels")
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO of the backbone")
    steps: int = Field(1, ge=1, description="of a crew in its turn")
    repeats: int = Field(5, ge=1, description="turns of each crew, after one that is not counted; medians are told")

    @property
    def network(self) -> BackboneConfig:
        """The backbone."""
        return BackboneConfig(name=self.backbone, embedding_dim=self.dim, image_size=self.size, channels=3)


def measure_scaling(config: ScalingBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file, by number of processes.

    - `step_ms`: a step among others, and `alone_ms`: of as many processes at a time that never wait.
    - `efficiency`: the second over the first, median over the rounds.
    - `efficiency_of_fastest`: of each the fastest round; on a machine that does other work, too, nearer to the truth.
    - `parts_ms`: of the first, each phase less its collectives, and each collective with its waiting.
    - `alone_parts_ms`: of the second.
    - `links`: latency (microseconds) and bandwidth (GB/s) of a gather between two processes; null with one.

    Raises:
        ConfigError: it does not fit into memory.
        ClusterError: a process has ended.
    """
    worlds = [1 << power for power in range(config.workers.bit_length())]
    parameters = count_backbone(config.network).parameters
    _check(config, worlds[-1], parameters)
    rounds: dict[int, list[dict[str, Told]]] = {}
    links: dict[str, float] | None = None
    for world in worlds:
        progress(f"starting {world} processes of each kind")
        with Crew(world, make_rank, config, True) as together, Crew(world, make_rank, config, False) as alone:
            rounds[world] = []
            for number in range(config.repeats + 1):
                progress(f"{world} processes: round {number} of {config.repeats}")
                crews = {"together": together, "alone": alone}
                rounds[world].append({kind: _turn(crew, config.steps) for kind, crew in crews.items()})
            if world == 2:
                links = _links(together.ask("links"))
    counted = {world: of_world[1:] for world, of_world in rounds.items()}
    return {
        "benchmark": "scaling",
        **config.model_dump(),
        "machine": machine(CPU),
        "parameters": parameters,
        "step_ms": {str(world): _median(told, "together", "step") for world, told in counted.items()},
        "alone_ms": {str(world): _median(told, "alone", "step") for world, told in counted.items()},
        "efficiency": {
            str(world): statistics.median(one["alone"]["step"] / one["together"]["step"] for one in told)
            for world, told in counted.items()
        },
        "efficiency_of_fastest": {
            str(world): _fastest(told, "alone") / _fastest(told, "together") for world, told in counted.items()
        },
        "parts_ms": {str(world): _parts(told, "together") for world, told in counted.items()},
        "alone_parts_ms": {str(world): _parts(told, "alone") for world, told in counted.items()},
        "links": links,
        "rounds_ms": {
            str(world): [{kind: 1e3 * crew["step"] for kind, crew in one.items()} for one in told]
            for world, told in counted.items()
        },
    }


def _check(config: ScalingBenchmark, ranks: int, parameters: int) -> None:
    own = RANK_BYTES + 4 * (5 * parameters + 3 * config.rows * config.dim)
    if (needed := 2 * ranks * own) > (free := free_bytes(CPU)):
        raise ConfigError(
            f"this takes about {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} GB are free; "
            "lower --workers, --rows or --dim"
        )


def _turn(crew: Crew, steps: int) -> Told:
    """Seconds of a step by part, mean over steps and ranks: all of a crew are at work at the same time."""
    by_rank: list[Told] = crew.ask(steps)
    return {name: sum(told[name] for told in by_rank) / len(by_rank) / steps for name in by_rank[0]}


def _median(rounds: list[dict[str, Told]], kind: str, name: str) -> float:
    return 1e3 * statistics.median(one[kind][name] for one in rounds)


def _fastest(rounds: list[dict[str, Told]], kind: str) -> float:
    return min(one[kind]["step"] for one in rounds)


def _parts(rounds: list[dict[str, Told]], kind: str) -> dict[str, float]:
    return {name: _median(rounds, kind, name) for name in rounds[0][kind] if name != "step"}


def _links(by_rank: list[tuple[float, float]]) -> dict[str, float]:
    """From a short and a long gather between two: t = latency + half of the whole / bandwidth."""
    short, long = (max(seconds) for seconds in zip(*by_rank, strict=True))
    bandwidth = (LONG - SHORT) / 2 / (long - short)
    return {"latency": MICRO * max(0.0, short - SHORT / 2 / bandwidth), "bandwidth": bandwidth / GIGA}


# What the ranks do


def make_rank(rank: int, size: int, folder: str, config: ScalingBenchmark, among_others: bool) -> Callable[[Any], Any]:
    """A rank of a training; asked for a number of steps, it takes them and tells the seconds."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), DS_ACCELERATOR="cpu")
    if among_others:
        store = dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    else:
        join_nobody(rank, size)
    clock = CollectiveClock()
    trainer = _trainer(config, size)
    trainer.pulse = clock
    generator = torch.Generator().manual_seed(rank)
    images_bCHW = torch.randn(config.batch, 3, config.size, config.size, generator=generator)
    labels_b = torch.randint(config.rows * size, (config.batch,), generator=generator)

    def answer(question: Any) -> Any:
        if question == "links":
            return gather_seconds(SHORT), gather_seconds(LONG)
        clock.seconds.clear()
        began = time.perf_counter()
        for _ in range(question):
            _, norms = trainer.step(images_bCHW, labels_b, 0)
            assert norms, "a step on which nobody moved is no measurement"
        return {**clock.seconds, "step": time.perf_counter() - began}

    return answer


def _trainer(config: ScalingBenchmark, size: int) -> Trainer:
    training = TrainingConfig.model_validate(
        {
            "steps": 1,
            "global_batch": config.batch * size,
            "optimiser": OptimiserConfig(name="sgd", learning_rate=1e-6),
            "engine": {"zero_stage": config.zero_stage},
        }
    )
    table = IdentityTable(f"{row:09d}" for row in range(config.rows * size))
    margin = MarginConfig(name="cosface", scale=64.0, m3=0.35)
    settings = (config.network, margin, Bct(), training, ClassifierConfig())
    return Trainer("new", table, [], *settings, config_digest="0" * 64, seed=0, device=CPU)


def gather_seconds(size: int) -> float:
    """Median seconds of a gather among all ranks, of `size` bytes together."""
    own = torch.zeros(size // 4 // dist.get_world_size())
    whole = own.new_empty(len(own) * dist.get_world_size())
    times = []
    for _ in range(LINK_REPEATS + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather_single(whole, own)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
