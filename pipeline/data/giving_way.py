"""Threads that work in the gaps that training leaves, as long as there are gaps."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

LONG_S = 0.1  # a wait that is worth a look
LEAST_SHARE = 0.5  # of it that this process has computed; below that others had the processors


def give_way(prefix: str) -> None:
    """Have the threads of this process whose names begin so run where a processor would be idle.

    Whoever else wakes up takes it from them at once. A low priority (nice) is not the same: such a thread keeps its
    processor for a while, and a training step that goes on after each collective waits for it every time.
    """
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that has just ended
            if (thread / "comm").read_text().startswith(prefix):
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


class Wait:
    """A wait for threads that give way, as a context.

    Attributes:
        starved: whether they hardly ran in it, because others use all processors: there are no gaps to work in.
    """

    def __init__(self) -> None:
        self.starved = False

    def __enter__(self) -> Self:
        self._began, self._computed = time.monotonic(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waited, computed = time.monotonic() - self._began, time.process_time() - self._computed
        self.starved = waited > LONG_S and computed < LEAST_SHARE * waited
