"""Where the time of a step goes: by named parts of the code, in whatever layer they are, for whoever listens.

    with part("gather"): ...        # in the code that is timed; costs next to nothing while nobody listens
    with listening(Parts(clock)):   # in the loop

Of nested parts only the innermost one's time runs, so that the parts of a step add up to the step. Nothing waits for a
GPU: its clock's marks are events in its queue, which are read once they have passed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Literal, Protocol, TypeVar, get_args

import torch

Part = Literal[
    "load",  # the loader is waited for
    "backbone",  # forward and backward, and what DeepSpeed sends in backward
    "gather",  # of features and labels, where also the slowest rank is waited for
    "classifier",  # both passes over the new prototypes
    "parents",  # all that the losses towards the parents cost
    "exchange",  # of softmax statistics
    "reduce",  # of feature gradients, as far as nothing hides it
    "optimiser",  # of the backbone and of the prototypes
    "save",  # checkpoints, as far as training waits for them
    "other",
]
PARTS: tuple[Part, ...] = get_args(Part)
MOST_MARKS = 4096  # kept; the older half of them is added up then, and long past on any device

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Tells times, perhaps later than they are."""

    def mark(self) -> Mark:
        """Now, for the device."""

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks; waits until the device has come to the later one."""


class HostClock:
    """Of this process."""

    def mark(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """The difference."""
        return end - start


class GpuClock:
    """Of the current CUDA stream: work that was queued for it, and the time that it had nothing to do."""

    def mark(self) -> torch.cuda.Event:
        """An event at the end of the queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two events."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Parts(Generic[Mark]):
    """Adds up the time of each part.

    One thread at a time may be in a part: autograd's thread of a GPU may, which the training's waits for.

    Attributes:
        traced: whether parts are named for torch's profiler, too.
    """

    def __init__(self, clock: Clock[Mark]) -> None:
        self.traced = False
        self._clock = clock
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._now: Part = "other"
        self._marks: list[tuple[Part, Mark]] = [("other", clock.mark())]  # which part begins when

    @contextmanager
    def within(self, name: Part) -> Iterator[None]:
        """Be in a part; the one around it goes on afterwards."""
        around = self._now
        self._begin(name)
        try:
            if self.traced:
                with torch.profiler.record_function(name):
                    yield
            else:
                yield
        finally:
            self._begin(around)

    def take(self) -> dict[Part, float]:
        """Seconds of each part since this was last asked, or since the beginning."""
        self._begin(self._now)
        self._add_up(len(self._marks) - 1)
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def _begin(self, name: Part) -> None:
        self._now = name
        self._marks.append((name, self._clock.mark()))
        if len(self._marks) > MOST_MARKS:
            self._add_up(MOST_MARKS // 2)

    def _add_up(self, spans: int) -> None:
        """Of the oldest spans between two marks."""
        for (name, start), (_, end) in zip(self._marks[:spans], self._marks[1:], strict=False):
            self._seconds[name] += self._clock.seconds(start, end)
        del self._marks[:spans]


_listener: Parts[float] | Parts[torch.cuda.Event] | None = None


@contextmanager
def part(name: Part) -> Iterator[None]:
    """Name a part of the step for whoever listens."""
    if _listener is None:
        yield
        return
    with _listener.within(name):
        yield


@contextmanager
def listening(parts: Parts[float] | Parts[torch.cuda.Event]) -> Iterator[None]:
    """Have this process's parts timed: there is one training in a process."""
    global _listener  # noqa: PLW0603  what is timed lies in layers that know nothing of each other
    assert _listener is None, "somebody listens already"
    _listener = parts
    try:
        yield
    finally:
        _listener = None
