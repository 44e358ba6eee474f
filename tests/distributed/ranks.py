"""Run a function on real processes joined by gloo, one a rank, and bring back what each returns."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
LOST = 9  # exit code of a rank that ends itself
CONTEXT = multiprocessing.get_context("forkserver")
os.environ["DS_ACCELERATOR"] = "cpu"
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "torch.distributed.checkpoint", "torch.distributed.tensor"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(rank, world_size, *arguments)` on `world_size` processes; results by rank.

    `function` must be importable (a module's top level). A rank's failure is raised here with its traceback.
    """
    results: Any = CONTEXT.SimpleQueue()
    with _ranks(world_size, _rank, results, function, arguments) as processes:
        return _collect(processes, results, world_size)


def exit_codes(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """As `run_ranks`, but ranks may die: each one's exit code, 0 for one that came to its end; negative: a signal.

    A rank that fails with an exception leaves its traceback on stderr, and the code 1.
    """
    with mortal_ranks(world_size, function, *arguments) as processes:
        for process in processes:
            process.join(TIMEOUT_S)
        return [process.exitcode for process in processes]


@contextmanager
def mortal_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """The processes of such ranks, by rank."""
    with _ranks(world_size, _mortal, function, arguments) as processes:
        yield processes


def lose_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """As `run_ranks`, but one rank ends itself by `os._exit(LOST)`; the others end as its machine's neighbours do."""
    results: Any = CONTEXT.SimpleQueue()
    with _ranks(world_size, _rank, results, function, arguments) as processes:
        wait([process.sentinel for process in processes], TIMEOUT_S)
    told = [] if results.empty() else [results.get()[2]]
    assert LOST in [process.exitcode for process in processes], told


@contextmanager
def _ranks(world_size: int, target: Callable[..., None], *arguments: Any) -> Iterator[list[Any]]:
    """Processes that call `target(rank, world_size, folder, *arguments)`; at the end there are none."""
    with tempfile.TemporaryDirectory() as folder:
        processes: list[Any] = [
            CONTEXT.Process(target=target, args=(rank, world_size, folder, *arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.join()


def _mortal(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    _join(rank, world_size, folder)
    function(rank, world_size, *arguments)
    os._exit(0)  # without the farewells of a group whose other members may be dead


def _collect(processes: list[Any], results: Any, world_size: int) -> list[Any]:
    by_rank: dict[int, Any] = {}
    while len(by_rank) < world_size:
        if not results._reader.poll(TIMEOUT_S):
            raise TimeoutError(f"ranks {sorted(set(range(world_size)) - by_rank.keys())} gave no result")
        rank, value, failure = results.get()
        if failure:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        by_rank[rank] = pickle.loads(value)
    for process in processes:
        process.join(TIMEOUT_S)
    return [by_rank[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch.distributed as dist

    try:
        _join(rank, world_size, folder)
        value = pickle.dumps(function(rank, world_size, *arguments))  # by value: a queue would share tensors' memory
        results.put((rank, value, None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  everything is carried to the parent and raised there
        results.put((rank, None, traceback.format_exc()))


def _join(rank: int, world_size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(str(Path(folder) / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
