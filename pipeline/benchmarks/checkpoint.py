"""Saving a large classifier and loading it on another number of ranks, beside a plain copy of the same bytes.

Ranks are processes joined by gloo. Files leave the page cache before they are read, so that both sides meet the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pipeline.benchmarks.measure import GIB, free_bytes, machine, peak_extra_bytes
from pipeline.errors import ConfigError
from pipeline.model.classifier import ShardedClassifier
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.schema import Config
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.checkpoint_state import State, rows_state
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.row_optimiser import RowOptimiser

CPU = torch.device("cpu")
DIGEST = "0" * 64
RANK_BYTES = GIB // 2  # of a process before it holds anything

Told = dict[str, float]


class CheckpointBenchmark(Config):
    """What is measured."""

    rows: int = Field(10_000_000, ge=8, description="identities of the classifier that is re-sharded, with momentum")
    stall_rows: int = Field(2_000_000, ge=8, description="of the one that is saved while training would go on")
    dim: int = Field(128, ge=1, description="of an embedding")
    writers: int = Field(4, ge=1, description="ranks that save")
    readers: int = Field(3, ge=1, description="ranks that load")
    folder: str | None = Field(None, description="for the files, on the disk to measure; none: the temporary one")
    repeats: int = Field(3, ge=1, description="rounds; medians are told, of memory the largest")


def measure_checkpoint(config: CheckpointBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file.

    - `stall_ratio`: how long `save` keeps training, over how long it does when it writes before it returns.
    - `resume_s`: from the folder to all ranks' rows, digests compared.
    - `reshard_over_copy`: the speed of that over the speed of a copy of the same files, flushed to disk.
    - `reshard_extra_bytes`: the most that a rank's memory grew, its own part being there before.

    Raises:
        ConfigError: memory or disk are too small.
    """
    size = 2 * 4 * config.rows * config.dim
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=config.folder) as name:
        folder = Path(name)
        _check(config, size, folder)
        progress("saving, synchronously and not")
        stalls = _slowest(_on_ranks(config.writers, _stall, config, folder / "stall"))
        shutil.rmtree(folder / "stall")
        progress(f"writing {size / 1e9:.1f} GB")
        write_s = _slowest(_on_ranks(config.writers, _write, config, folder / "run"))[0]["write_s"]
        rounds = []
        for number in range(config.repeats):
            progress(f"round {number + 1} of {config.repeats}: copy, then re-sharding")
            copied = {"copy_s": _copy(folder / "run", folder / "copy")}
            rounds.append(copied | _slowest(_on_ranks(config.readers, _load, config, folder / "run"))[0])
    median = {key: statistics.median(told[key] for told in rounds) for key in ("copy_s", "resume_s")}
    return {
        "benchmark": "checkpoint",
        **config.model_dump(exclude={"folder"}),
        "machine": machine(CPU),
        "bytes": size,
        "stall_bytes": 2 * 4 * config.stall_rows * config.dim,
        "first_stall_s": stalls[0]["stall_s"],
        **{key: statistics.median(told[key] for told in stalls[1:]) for key in ("stall_s", "sync_s")},
        "stall_ratio": statistics.median(told["stall_s"] / told["sync_s"] for told in stalls[1:]),
        "write_s": write_s,
        **median,
        "reshard_over_copy": statistics.median(told["copy_s"] / told["resume_s"] for told in rounds),
        "reshard_extra_bytes": int(max(told["extra_bytes"] for told in rounds)),
        "rounds": {"stall": stalls, "reshard": rounds},
    }


def _check(config: CheckpointBenchmark, size: int, folder: Path) -> None:
    own = RANK_BYTES * max(config.writers, config.readers)
    memory = own + max(size, 2 * 2 * 4 * config.stall_rows * config.dim)
    for kind, needed, free in (
        ("memory", memory, free_bytes(CPU)),
        ("disk", 2 * size, shutil.disk_usage(folder).free),
    ):
        if needed > free:
            raise ConfigError(
                f"this takes about {needed / 1e9:.0f} GB of {kind}, of which {free / 1e9:.0f} GB are free; "
                "lower --rows, --stall-rows or --dim"
            )


# What the ranks do


def _held(rows: int, config: CheckpointBenchmark) -> tuple[ShardedClassifier, RowOptimiser, State]:
    """This rank's rows and momentum, all of it in memory, and the state that is saved of them."""
    margin = MarginConfig(name="cosface", scale=64.0, m3=0.35)
    classifier = ShardedClassifier("new", rows, config.dim, margin, mesh=ClassMesh.of_world("cpu"))
    optimiser = RowOptimiser(classifier.weight_CD, OptimiserConfig(name="sgd"))
    optimiser.slots["momentum_buffer"].copy_(classifier.weight_CD).mul_(2)
    return classifier, optimiser, {"classifier": rows_state(classifier, optimiser)}


def _stall(config: CheckpointBenchmark, folder: Path) -> list[Told]:
    """Seconds of both ways of saving; the first round meets memory that was never used."""
    _, _, state = _held(config.stall_rows, config)
    ways = {
        name: Checkpoints(CheckpointConfig(keep=1, asynchronous=name == "stall_s"), DIGEST)
        for name in ("stall_s", "sync_s")
    }
    rounds: list[Told] = []
    for number in range(config.repeats + 1):
        told: Told = {}
        for name, checkpoints in ways.items():
            dist.barrier()
            began = time.perf_counter()
            checkpoints.save(folder / name, number, state, {})
            told[name] = time.perf_counter() - began
            checkpoints.join()
        rounds.append(told)
    return rounds


def _write(config: CheckpointBenchmark, folder: Path) -> list[Told]:
    _, _, state = _held(config.rows, config)
    dist.barrier()
    began = time.perf_counter()
    Checkpoints(CheckpointConfig(asynchronous=False), DIGEST).save(folder, 1, state, {})
    return [{"write_s": time.perf_counter() - began}]


def _load(config: CheckpointBenchmark, folder: Path) -> list[Told]:
    """Seconds until this rank has its part, and how far its memory grew above that part."""
    classifier, optimiser, state = _held(config.rows, config)
    parts = classifier.weight_CD, optimiser.slots["momentum_buffer"]
    expected = [_probe(part) for part in parts]
    for part in parts:
        part.zero_()
    seconds: list[float] = []

    def load() -> None:
        dist.barrier()
        began = time.perf_counter()
        Checkpoints(CheckpointConfig(), DIGEST).restore(folder, state)
        seconds.append(time.perf_counter() - began)

    extra = peak_extra_bytes(load, CPU)
    assert all(torch.equal(_probe(part), before) for part, before in zip(parts, expected, strict=True))
    return [{"resume_s": seconds[0], "extra_bytes": extra}]


def _probe(part: Tensor) -> Tensor:
    """Rows from all over a part; prototypes are a function of their number, so they are known beforehand."""
    return part[:: max(1, len(part) // 1000)].clone()


def _on_ranks(ranks: int, work: Callable[..., list[Told]], *arguments: object) -> list[list[Told]]:
    """Call `work` on so many processes; what each tells, by rank."""
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_rank, (ranks, meeting, work, arguments), nprocs=ranks)
        return [json.loads((Path(meeting) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, meeting: str, work: Callable[..., list[Told]], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{meeting}/store", ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    told = work(*arguments)
    (Path(meeting) / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def _slowest(by_rank: list[list[Told]]) -> list[Told]:
    """Of each round and figure the largest over the ranks."""
    return [{key: max(told[key] for told in ranks) for key in ranks[0]} for ranks in zip(*by_rank, strict=True)]


# The plain copy


def _copy(source: Path, target: Path) -> float:
    """Seconds of copying a folder's files to the disk; neither they nor the copy are left in memory."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in files:
        _forget(path)
    began = time.perf_counter()
    for path in files:
        beside = target / path.relative_to(source)
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    for path in files:
        _forget(path)
    return seconds


def _forget(path: Path) -> None:
    """Let the system drop a file from memory."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
