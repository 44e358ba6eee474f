"""Ranks that meet nobody: a process group whose collectives are copies of what the rank itself has.

The same program, unchanged, does the same work on it as among others (the classifier sees as many samples), and never
waits. What comes out is no training: every rank takes its own part for everybody's.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d
from torch.futures import Future

NAME = "alone"
# torch lets a group be written in Python, but its stubs do not.
_C10D: Any = _distributed_c10d
_Group: Any = dist.ProcessGroup


class AloneGroup(_Group):  # type: ignore[misc]
    """One rank of `size`, on its own. What is not defined here raises in torch."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._own_rank, self._own_size, self._own_name = rank, size, ""

    @property
    def group_name(self) -> str:
        """torch finds groups by it."""
        return self._own_name

    def _set_group_name(self, name: str) -> None:
        self._own_name = name

    @property
    def group_desc(self) -> str:
        """For people."""
        return NAME

    def _set_group_desc(self, _: str) -> None:
        pass

    def allreduce(self, tensors: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        """The sum over all is what the rank has."""
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        """What rank 0 has is what the rank has."""
        return _done(tensors)

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """All are here."""
        return _done([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        """Each other rank's part is a copy of the own one."""
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(own)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, own: Tensor, *_: Any, **__: Any) -> dist.Work:
        """As `allgather`, into one tensor."""
        output.view(self._own_size, -1).copy_(own.reshape(1, -1).expand(self._own_size, -1))
        return _done(output)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, *_: Any, **__: Any) -> dist.Work:
        """The own part of what the rank has."""
        output.copy_(whole.view(self._own_size, *output.shape)[self._own_rank])
        return _done(output)

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single


def join_nobody(rank: int, size: int) -> None:
    """Make this process such a rank; the counterpart of `dist.init_process_group`."""
    dist.Backend.register_backend(NAME, lambda _store, own, ranks, _timeout: AloneGroup(own, ranks), devices=["cpu"])
    dist.init_process_group(NAME, store=_C10D.HashStore(), rank=rank, world_size=size)


def _done(value: object) -> dist.Work:
    future: Future[object] = Future()
    future.set_result(value)
    work: dist.Work = _C10D._create_work_from_future(future)
    return work
