"""Traces of some steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.parts import Parts
from pipeline.schema import Config

log = logging.getLogger(__name__)


class ProfileConfig(Config):
    """Which steps a trace is written of."""

    start: int = Field(20, ge=0, description="the first one")
    steps: int = Field(3, ge=1, description="how many; each takes some MB")
    ranks: tuple[int, ...] = Field((0,), description="whose")


class Tracer:
    """Records steps with torch's profiler: operators, kernels, and the parts of a step by their names.

    Args:
        config: which; None: none.
        parts: of this rank, named while it records.
        folder: where `trace-RANK-STEP.json.gz` is written, STEP the first one.
        rank: this one.
    """

    def __init__(self, config: ProfileConfig | None, parts: Parts[Any], folder: Path, rank: int) -> None:
        self._config = config if config is not None and rank in config.ranks else None
        self._parts, self._folder, self._rank = parts, folder, rank
        self._profiler: torch.profiler.profile | None = None

    def at(self, step: int) -> None:
        """A step begins: begin to record, or end."""
        config = self._config
        if config is None:
            return
        if self._profiler is not None and not config.start <= step < config.start + config.steps:
            self.end()
        elif self._profiler is None and step == config.start:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._parts.traced = True

    def end(self) -> None:
        """Write what was recorded, if anything; there is one trace a run."""
        profiler, self._profiler, self._parts.traced = self._profiler, None, False
        if profiler is None or self._config is None:
            return
        profiler.stop()
        name = f"trace-{self._rank:05d}-{self._config.start:06d}.json.gz"
        self._config = None
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = self._folder / f".{name}"  # its ending says that it is packed
        profiler.export_chrome_trace(str(beside))
        beside.rename(self._folder / name)
        log.info("wrote the trace %s", self._folder / name)
