"""What keeps a run from going on wrong: values that are no numbers, and disks and memories that are full."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.schema import Config
from pipeline.training.stopping import Wish

if TYPE_CHECKING:  # the trainer asks these
    from pipeline.training.trainer import Trainer

GIB = 1 << 30
SPARE = 1.05  # what a checkpoint takes on a disk, at most, over the bytes of its tensors
SPARE_BYTES = 1 << 24


class GuardConfig(Config):
    """When a run stops, or goes back, of itself."""

    nonfinite_limit: int = Field(
        3, ge=0, description="steps with a loss or gradient that is no number before the run gives up"
    )
    spike_factor: float = Field(
        30.0, gt=0, description="deviations above the running median from which on a loss counts as a spike"
    )
    rewind: bool = Field(False, description="after a spike, go back to the last checkpoint and skip the batches since")
    rewind_limit: int = Field(3, ge=1, description="times that a run goes back; later spikes are told only")
    collective_timeout_s: float = Field(
        600.0, gt=0, description="seconds without progress after which a rank names who is behind, and ends"
    )
    loader_timeout_s: float = Field(500.0, gt=0, description="seconds that a batch's shards are waited for")


def all_finite(tensors: Sequence[Tensor], wish: Wish = Wish.GO_ON) -> tuple[bool, bool, Wish]:
    """Whether all values are finite numbers: this rank's, and those of all ranks. Collective: one for two numbers.

    Args:
        tensors: this rank's.
        wish: what this rank has been asked.

    Returns:
        Of this rank, of all ranks; and the strongest wish of any rank.
    """
    here = torch.stack([tensor.isfinite().all() for tensor in tensors]).all().to(torch.int32)
    told = torch.stack([here, here.new_tensor(-int(wish))])
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    mine, everywhere, strongest = torch.cat([here[None], told]).tolist()
    return bool(mine), bool(everywhere), Wish(-strongest)


def note(folder: Path, kind: str, rank: int, entry: dict[str, Any]) -> Path:
    """Append a line to a rank's own file `KIND-RANK.jsonl`: several machines must not append to one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{rank:05d}.jsonl"
    with path.open("a") as stream:
        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return path


def free_bytes(folder: Path) -> int:
    """Bytes that can be written under a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(folder: Path | str, needed: int, device: torch.device, step: int, last: int | None) -> None:
    """Refuse to begin a checkpoint that would not fit; the one before stays until the new one is whole. Collective.

    Args:
        folder: of the checkpoints; behind a URL nobody knows how much room there is.
        needed: bytes of the checkpoint.
        device: on which the ranks can speak to each other.
        step: of the checkpoint.
        last: step of the last one.

    Raises:
        TrainingError: on every rank, if one of them has no room.
    """
    if "://" in str(folder):
        return
    free = torch.tensor(free_bytes(Path(folder)), device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if int(free) < needed * SPARE + SPARE_BYTES:
        raise TrainingError(
            f"the checkpoint of step {step} needs {needed * SPARE / GIB:.3f} GiB, but {folder} has "
            f"{int(free) / GIB:.3f} GiB free; make room, then run the same command again: {goes_on_from(last)}"
        )


def goes_on_from(last: int | None) -> str:
    """Where a run that ends now will go on."""
    return "it starts over, no checkpoint was written yet" if last is None else f"it goes on from step {last}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out; torch's allocator on the CPU says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def memory_advice(trainer: Trainer) -> Iterator[None]:
    """Turn memory that has run out into the setting that would have needed less.

    Raises:
        TrainingError: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"{memory_words(trainer)}") from error


def memory_words(trainer: Trainer) -> str:
    """One line: where it ran out, and what to set."""
    config, classifier, ranks = trainer.config, trainer.classifier, dist.get_world_size()
    gpu = trainer.device.type == "cuda"
    there = torch.cuda.get_device_properties(trainer.device).total_memory if gpu else _machine_bytes()
    plan = (
        f"python jobs/plan.py --identities {classifier.rows} --dim {classifier.weight_CD.shape[1]} "
        f"--batch {config.global_batch} --gpus {ranks} --gpu-memory {max(1, round(there / GIB))}"
    )
    twice = 2 * config.accumulation
    advice = f"set training.accumulation={twice}, or " if config.global_batch >= twice * ranks else ""
    return (
        f"rank {trainer.rank} is out of memory in the {trainer.pulse.phase} of step {trainer.pulse.step}; "
        f"{advice}find a setting that fits: {plan}"
    )


def _machine_bytes() -> int:
    """Memory of this process's share of the machine, if its ranks share alike."""
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
