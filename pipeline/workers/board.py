"""The board on which rank 0 posts how a training goes, and the driver what it wishes."""

from __future__ import annotations

import asyncio
import signal
import threading
from types import FrameType
from typing import Any

import ray

from pipeline.training.stopping import Wish


@ray.remote(num_cpus=0)
class Board:
    """Stands between the driver and the ranks; worker output is never parsed. Its methods run in one event loop."""

    def __init__(self) -> None:
        self.latest: tuple[str, int, dict[str, float]] = ("", 0, {})
        self.wish, self.wished = Wish.GO_ON, asyncio.Event()
        self.nodes: set[str] = set()

    async def post(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Replace what stands there."""
        self.latest = (name, step, metrics)

    async def read(self) -> tuple[str, int, dict[str, float]]:
        """The last post."""
        return self.latest

    async def begin(self) -> None:
        """Forget the last group of workers, and what was wished of it."""
        self.wish = Wish.GO_ON
        self.nodes.clear()

    async def join(self, node: str) -> None:
        """A rank says on which node it is."""
        self.nodes.add(node)

    async def where(self) -> set[str]:
        """The nodes of the ranks."""
        return self.nodes

    async def ask(self, wish: Wish) -> None:
        """Wish something of all ranks; a weaker wish than the last one changes nothing."""
        self.wish = max(self.wish, wish)
        self.wished.set()

    async def asked(self, known: Wish) -> Wish:
        """What is wished; answers once it is more than what is `known`."""
        while self.wish <= known:
            self.wished.clear()
            await self.wished.wait()
        return self.wish


class Ear:
    """What a rank has been asked: by the board, which rank 0 alone hears, or by SIGTERM. Calling it costs nothing."""

    def __init__(self, board: Any, rank: int) -> None:
        self.board, self.heard = board, Wish.GO_ON
        board.join.remote(ray.get_runtime_context().get_node_id())
        if rank == 0:
            threading.Thread(target=self._hear, name="ear", daemon=True).start()

    def __call__(self) -> Wish:
        """What was asked so far."""
        return Wish.NOW if _terminated.is_set() else self.heard

    def _hear(self) -> None:
        while self.heard < Wish.NOW:
            try:
                self.heard = ray.get(self.board.asked.remote(self.heard))
            except ray.exceptions.RayError:  # the driver is done, or gone, and the board with it
                return


_terminated = threading.Event()  # this process, a worker, has had a SIGTERM


def heed_sigterm() -> None:
    """Run in a worker's main thread: the first SIGTERM becomes a wish of all ranks, the second does what Ray lets it.

    Python runs the handler when the main thread is next called, which Ray Train does every two seconds.
    """
    end: Any = signal.getsignal(signal.SIGTERM)

    def heed(number: int, frame: FrameType | None) -> None:
        if _terminated.is_set():
            end(number, frame)
        _terminated.set()

    signal.signal(signal.SIGTERM, heed)
