"""Reading batches before they are asked for, in a thread that may be left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

from pipeline.data.reading import Work
from pipeline.errors import DataError

READ_AHEAD = 2  # batches read before DALI asks for them


class ReadAhead:
    """Calls `read` for each number, in order, READ_AHEAD of them before they are asked for.

    A daemon thread, not a pool: a read that never ends (a dead file server) must not keep the process from ending.

    Args:
        read: gives the batch of a number.
        numbers: of the batches.
        patience_s: seconds that a batch is waited for; None: for ever.
        place: what is being read, in a word.
    """

    def __init__(
        self, read: Callable[[int], Work], numbers: Iterable[int], patience_s: float | None, place: Callable[[], str]
    ) -> None:
        self._read, self._numbers, self._patience_s, self._place = read, numbers, patience_s, place
        self._wanted = threading.Semaphore(READ_AHEAD)
        self._done: queue.SimpleQueue[Work | BaseException | None] = queue.SimpleQueue()
        self._ended, self._stuck = False, False
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="shard-reader", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Batches that are read and not asked for yet."""
        return self._done.qsize()

    def __iter__(self) -> Iterator[Work]:
        """The batches.

        Raises:
            DataError: one did not come in time.
        """
        while True:
            try:
                work = self._done.get(timeout=self._patience_s)
            except queue.Empty:
                self._stuck = True
                raise DataError(
                    f"batch {self._number} did not come in {self._patience_s:g} s, while shard {self._place()} was "
                    "read; look at its disk or network, or raise training.guards.loader_timeout_s"
                ) from None
            if work is None:
                return
            if isinstance(work, BaseException):
                raise work
            self._wanted.release()
            yield work

    def end(self) -> bool:
        """Read no more; whether the thread is gone, and what it read from is free again."""
        self._ended = True
        self._wanted.release()
        if not self._stuck:
            self._thread.join()
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            for number in self._numbers:
                self._wanted.acquire()
                if self._ended:
                    return
                self._number = number
                self._done.put(self._read(number))
            self._done.put(None)
        except BaseException as error:  # noqa: BLE001  it is raised where the batch is wanted
            self._done.put(error)
