"""Processes that stay and are asked, one crew after the other: what waits for its turn takes no processor."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from pipeline.errors import ClusterError

CONTEXT = multiprocessing.get_context("forkserver")  # what takes long to import is imported once
os.environ.setdefault("DS_ACCELERATOR", "cpu")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "pipeline.benchmarks.scaling"])
Worker = Callable[[Any], Any]
MakeWorker = Callable[..., Worker]  # (rank, size, folder to meet in, *arguments), on the process


class Crew:
    """So many processes, each with a worker that answers what it is asked.

    Args:
        size: processes.
        make: makes each one's worker; importable.
        arguments: of `make`, behind its rank, their number and a folder.
    """

    def __init__(self, size: int, make: MakeWorker, *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="crew-")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = CONTEXT.Pipe()
            given = (theirs, rank, size, self._folder.name, make, arguments)
            process = CONTEXT.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._ends.append(mine)
            self._processes.append(process)

    def ask(self, question: object) -> list[Any]:
        """Ask all of them at once; their answers by rank.

        Raises:
            ClusterError: one of them has ended; it left its traceback on stderr.
        """
        try:
            for end in self._ends:
                end.send(question)
            return [end.recv() for end in self._ends]
        except (EOFError, OSError):
            raise ClusterError("a process of the benchmark has ended; its last words are above") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(end: Connection, rank: int, size: int, folder: str, make: MakeWorker, arguments: tuple[object, ...]) -> None:
    worker = make(rank, size, folder, *arguments)
    while True:
        try:
            question = end.recv()
        except EOFError:
            return
        end.send(worker(question))
