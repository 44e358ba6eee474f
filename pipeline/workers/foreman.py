"""The driver beside its workers: shows how they get on, and asks them to stop where something is to change."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import ray

from pipeline.errors import ClusterError, StoppedError
from pipeline.training.stopping import Wish
from pipeline.workers.config import ClusterConfig
from pipeline.workers.workforce import answering, free_places, leaving, nodes, places, room, shortage

POLL_S = 0.5
LOOK_S = 5.0  # between looks at the cluster's nodes
WAIT_S = 2.0  # between them while there are too few

Progress = Callable[[str, int, dict[str, float]], None]  # generation, steps done, figures


class Foreman:
    """Watches in a thread while the driver's main thread waits for Ray Train.

    Args:
        cluster: what the run asks of Ray.
        board: a `Board` actor, where rank 0 posts and hears.
        on_progress: called from the thread at each post.
    """

    def __init__(self, cluster: ClusterConfig, board: Any, on_progress: Progress) -> None:
        self.cluster, self.board, self.on_progress = cluster, board, on_progress
        self.workers = 0  # at work
        self.limit = cluster.workers  # of the next group
        self.reached: dict[str, int] = {}  # the furthest step that each generation has reported
        self.known_steps = 0
        self.terminated_at: float | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="foreman", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def terminated(self) -> bool:
        """Whether this process was told to end."""
        return self.terminated_at is not None

    def terminate(self) -> None:
        """SIGTERM: have a checkpoint written. The second one, which is also the deadline's, ends the waiting."""
        if self.terminated:
            raise KeyboardInterrupt
        self.terminated_at = time.monotonic()

    def first_muster(self) -> int:
        """Workers to begin with.

        Raises:
            ClusterError: the nodes have no room for enough: Ray would wait for ever.
        """
        there = nodes()
        found = room(self.cluster, there)
        if found < self.cluster.fewest:
            raise ClusterError(
                f"{shortage(self.cluster, there)}; lower cluster.workers, cluster.min_workers or "
                "cluster.cpus_per_worker, or add nodes"
            )
        return found

    def muster(self) -> int:
        """Workers to go on with, once nodes that answer have room for enough.

        Raises:
            StoppedError: this process was told to end, or has waited too long.
        """
        until = time.monotonic() + self.cluster.nodes_wait_s
        while not self.terminated:
            found = room(self.cluster, answering(node for node in nodes() if places(self.cluster, node)))
            if found >= self.cluster.fewest:
                return max(self.cluster.fewest, min(found, self.limit))
            if time.monotonic() > until:
                raise StoppedError(
                    f"the Ray cluster's nodes have room for {found} workers, and {self.cluster.fewest} are needed "
                    f"(waited cluster.nodes_wait_s={self.cluster.nodes_wait_s:g})"
                )
            time.sleep(WAIT_S)
        raise StoppedError("told to end (SIGTERM) between two groups of workers")

    def engage(self, workers: int) -> None:
        """A new group of workers begins."""
        ray.get(self.board.begin.remote())
        self.workers, self.limit = workers, self.cluster.workers

    def ask_for_what_is_free(self) -> None:
        """The next group is to have as many workers as nobody else leaves without a place."""
        self.limit = free_places(self.cluster)

    def got_further(self) -> bool:
        """Whether later steps than ever were reported since this was last asked."""
        before, self.known_steps = self.known_steps, sum(self.reached.values())
        return self.known_steps > before

    def _follow(self) -> None:
        last, look_at = ("", 0), time.monotonic() + LOOK_S
        while not self.ended.wait(POLL_S):
            last = self._tell(last)
            with suppress(ray.exceptions.RayError, TimeoutError):  # a cluster that is silent now may answer next time
                if self.terminated_at is not None:
                    self._ask_to_end(self.terminated_at)
                elif time.monotonic() >= look_at:
                    self._look_at_nodes()
                    look_at = time.monotonic() + LOOK_S
        while (latest := self._tell(last)) != last:  # what was under way when the training ended
            last = latest

    def _tell(self, last: tuple[str, int]) -> tuple[str, int]:
        try:
            name, step, metrics = ray.get(self.board.read.remote(), timeout=10)
        except (ray.exceptions.RayError, TimeoutError):
            return last
        if (name, step) != last:
            self.on_progress(name, step, metrics)
            self.reached[name] = max(step, self.reached.get(name, 0))
        return name, step

    def _ask_to_end(self, since: float) -> None:
        self.board.ask.remote(Wish.NOW)
        if time.monotonic() > since + self.cluster.preemption_deadline_s and not self.ended.is_set():
            _thread.interrupt_main(signal.SIGTERM)

    def _look_at_nodes(self) -> None:
        """Leave nodes that will be taken away, at once; use new ones, after the next checkpoint."""
        if leaving() & ray.get(self.board.where.remote(), timeout=10):
            self.board.ask.remote(Wish.NOW)
        elif room(self.cluster, nodes()) > self.workers and (free := free_places(self.cluster)) > 0:
            self.limit = self.workers + free
            self.board.ask.remote(Wish.AT_CHECKPOINT)
