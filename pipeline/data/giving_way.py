"""Threads that work in the gaps that training leaves, as long as there are gaps."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

STARVED = 3  # waits in which the threads hardly ran, after which there are no gaps; one may be a program that starts
LONG_S = 0.1  # a wait that is worth a look
LEAST_SHARE = 0.5  # of it that this process has computed; below that others had the processors


def threads_named(prefix: str) -> set[int]:
    """Threads of this process whose names begin so; a thread names itself once it runs."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that has just ended
            if (thread / "comm").read_text().startswith(prefix):
                found.add(int(thread.name))
    return found


class Gaps:
    """What training leaves of the processors, to threads that work ahead of it.

    They run where a processor would be idle; whoever else wakes up takes it from them at once. A low priority (nice) is
    not the same: such a thread keeps its processor for a while, and a training step that goes on after each collective
    waits for it every time. Nobody can take it back without privileges: threads that starve are replaced by new ones.

    Args:
        prefix: of the threads' names.
        used: whether they are to work there at all.
    """

    def __init__(self, prefix: str, used: bool) -> None:
        self._prefix, self._used, self._starved = prefix, used, 0

    def before_threads(self) -> None:
        """New ones are about to be made."""
        self._others, self._new = threads_named(self._prefix), True

    def over(self, wait: Wait) -> bool:
        """After a wait for them: whether there are no gaps any longer, and they are to be made anew."""
        if not self._used:
            return False
        if self._new:  # they have worked, and are known by their names
            for thread in threads_named(self._prefix) - self._others:
                with suppress(OSError):
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        self._new = False
        self._starved += wait.starved
        self._used = self._starved < STARVED
        return not self._used


class Wait:
    """A wait for such threads, as a context.

    Attributes:
        starved: whether they hardly ran in it, because others use all processors.
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
