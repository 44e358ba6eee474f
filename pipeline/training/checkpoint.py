"""Checkpoints of a running training: everything by full name or by row range, so that any world size can read them.

A checkpoint is a folder `step-NNNNNNNN` that torch.distributed.checkpoint wrote, with `checkpoint.json` in it. It is
written under another name and renamed when complete; the one before stays until then.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from pipeline.files import write_json
from pipeline.model.classifier import ShardedClassifier
from pipeline.training.row_optimiser import RowOptimiser

META = "checkpoint.json"
BLOCK_ROWS = 1 << 16  # rows of a classifier that are read as one


def latest(folder: Path, config_digest: str) -> Path | None:
    """The newest complete checkpoint of this config, if there is one."""
    complete = sorted(path for path in folder.glob("step-????????") if (path / META).is_file())
    fitting = [path for path in complete if json.loads((path / META).read_text())["config_digest"] == config_digest]
    return fitting[-1] if fitting else None


def save(folder: Path, step: int, config_digest: str, state: dict[str, Any]) -> None:
    """Write a checkpoint and drop those before it. Collective; every rank returns after it is complete."""
    final = folder / f"step-{step:08d}"
    beside = folder / f"{final.name}.tmp"
    if dist.get_rank() == 0:
        for stale in (final, beside):
            shutil.rmtree(stale, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    save_sharded(state, checkpoint_id=beside)
    if dist.get_rank() == 0:
        write_json(beside / META, {"step": step, "config_digest": config_digest, "world_size": dist.get_world_size()})
        beside.rename(final)
        for other in folder.glob("step-*"):
            if other != final:
                shutil.rmtree(other, ignore_errors=True)
    dist.barrier()


def load(path: Path, state: dict[str, Any]) -> int:
    """Fill `state`'s tensors in place from a checkpoint and return its step. Collective."""
    load_sharded(state, checkpoint_id=path)
    step: int = json.loads((path / META).read_text())["step"]
    return step


def rows_state(classifier: ShardedClassifier, optimiser: RowOptimiser) -> dict[str, Tensor]:
    """The classifier's rows, their optimiser state and parents' rows that move, each this rank's range of a tensor.

    The range is cut at multiples of BLOCK_ROWS: a rank of another world size reads those blocks that hold its rows.
    """
    grid = classifier.mesh.grid
    assert grid is not None, "checkpoints are written by a process group"
    moving = {f"follows.{head.name}": head.weight_CD for head in classifier.followers.heads}
    parts = {"weight": classifier.weight_CD, **optimiser.slots, **moving}
    return {
        name: DTensor.from_local(
            _in_blocks(part, classifier.first_row),
            grid,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=torch.Size((classifier.rows, part.shape[1])),
            stride=(part.shape[1], 1),
        )
        for name, part in parts.items()
    }


def _in_blocks(part: Tensor, first_row: int) -> Tensor:
    end_row = first_row + len(part)
    inner = range(-(-(first_row + 1) // BLOCK_ROWS) * BLOCK_ROWS, end_row, BLOCK_ROWS)
    edges = [first_row, *inner, end_row] if len(part) else []
    blocks = [part[start - first_row : stop - first_row] for start, stop in pairwise(edges)]
    return LocalShardsWrapper(blocks, [(start, 0) for start in edges[:-1]])
