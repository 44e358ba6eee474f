"""How long a training step computes and how long it is in collectives, part by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipeline.training.watchdog import Pulse

COLLECTIVES = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "all_reduce")


class CollectiveClock(Pulse):
    """In the place of a trainer's pulse: `seconds` of each phase less its collectives, and of each collective.

    The collectives' names are the planner's. Those of the engine (in "backward" and "update") are the backbone's
    gradients, but for single numbers; of the classifier's two gathers the first one brings the features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._gathers = 0
        for name in COLLECTIVES:  # of `torch.distributed`, those that a step calls
            setattr(dist, name, self._timed(name, getattr(dist, name)))

    @contextmanager
    def __call__(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Be in a phase."""
        with super().__call__(phase, step):
            inside = self.collectives()
            began = time.perf_counter()
            self._gathers = 0
            yield
            self.seconds[phase] += time.perf_counter() - began - (self.collectives() - inside)

    def collectives(self) -> float:
        """Seconds in all of them so far."""
        return sum(seconds for name, seconds in self.seconds.items() if " " in name or name == "agreement")

    def _timed(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            first = tensors[0] if tensors else next(one for one in options.values() if isinstance(one, Tensor))
            part = self._part(name, first)
            began = time.perf_counter()
            work = collective(*tensors, **options)
            self.seconds[part] += time.perf_counter() - began
            return _TimedWork(self, part, work) if options.get("async_op") else work

        return call

    def _part(self, name: str, first: Tensor) -> str:
        if name == "all_reduce" and (first.numel() == 1 or self.phase == "losses"):
            return "agreement"
        if self.phase != "losses":
            return "backbone gradients"
        if name == "reduce_scatter_single":
            return "feature gradients"
        self._gathers += 1
        return "gather of features" if self._gathers == 1 else "softmax statistics"


class _TimedWork:
    """A collective that is under way."""

    def __init__(self, clock: CollectiveClock, part: str, work: Any) -> None:
        self._clock, self._part, self._work = clock, part, work

    def wait(self) -> object:
        began = time.perf_counter()
        told = self._work.wait()
        self._clock.seconds[self._part] += time.perf_counter() - began
        return told
