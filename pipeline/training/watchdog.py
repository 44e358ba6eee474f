"""Where each rank is, and the end of a run of which one rank does not come.

A collective that one rank never joins keeps the others waiting inside the library, where no Python exception reaches
them, and gloo's own time-out does not say who is missing. So each rank has a thread that writes the phase its training
is in to the process group's store. If its own phase takes too long, it reads all others', names those that are behind,
and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from pipeline.logs import complain
from pipeline.parts import Part, part

STUCK = 76  # exit code of a process that waited in vain
POLLS = 20  # looks within the bound
LONGEST_POLL_S = 5.0
STORE_PATIENCE_S = 10.0
PART_OF: dict[str, Part] = {  # of a phase, where nothing in it says otherwise; the rest is "other"
    "load": "load",
    "forward": "backbone",
    "losses": "classifier",
    "backward": "backbone",
    "update": "optimiser",
    "save": "save",
}


@dataclass(frozen=True)
class Beat:
    """Where a rank is: phases entered so far, step, phase, and whether it waits for others in a collective."""

    count: int
    step: int
    phase: str
    waits: bool


class Pulse:
    """The phase that this rank's training is in. All ranks enter the same phases in the same order."""

    def __init__(self) -> None:
        self.count, self.step, self.phase, self.since = 0, 0, "start", time.monotonic()

    @contextmanager
    def __call__(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Be in a phase, of the same step as before or of another."""
        self.step = self.step if step is None else step
        self.phase, self.since, self.count = phase, time.monotonic(), self.count + 1
        with part(PART_OF.get(phase, "other")):
            yield


class Watchdog:
    """Ends this process, with the code STUCK, once it has been in one phase for too long.

    What it found goes to stderr and, with the stack of every thread, to `stuck-RANK.txt`.

    Args:
        pulse: of this rank.
        bound_s: seconds that a phase may take.
        folder: of the file.
    """

    def __init__(self, pulse: Pulse, bound_s: float, folder: Path) -> None:
        self._pulse, self._bound_s, self._folder = pulse, bound_s, folder
        self._poll_s = min(bound_s / POLLS, LONGEST_POLL_S)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # A connection of its own: that of the process group may be held by whoever waits in it.
        self._store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=STORE_PATIENCE_S))
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._publish()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        answers = True
        while not self._ended.wait(self._poll_s):
            # The store is gone with the rank that held it, or cut off: told when the time is up.
            answers = answers and _in_time(self._publish)
            if (waited_s := time.monotonic() - self._pulse.since) > self._bound_s:
                self._give_up(waited_s)

    def _publish(self) -> None:
        frame = sys._current_frames().get(self._watched)
        beat = Beat(self._pulse.count, self._pulse.step, self._pulse.phase, waits_in_collective(frame))
        self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(beat)))

    def _give_up(self, waited_s: float) -> None:
        """Name who is behind, and end. The thread looks again a little later: all ranks run out of time together."""
        time.sleep(2 * self._poll_s)
        beats: list[Beat | None] = []
        if _in_time(lambda: beats.extend([self._beat_of(rank) for rank in range(self._ranks)])):
            line = f"{behind(beats, waited_s)}; rank {self._rank} gives up"
        else:
            line = f"rank {self._rank} waited {waited_s:.0f} s in its {self._pulse.phase}, and rank 0 does not answer"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stuck-{self._rank:05d}.txt").open("w") as stream:
            stream.write(f"{line}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream)
        complain(f"error: {line}; stacks in {self._folder}/stuck-*.txt")
        time.sleep(2 * self._poll_s)  # the others read the store, which ends with rank 0
        os._exit(STUCK)

    def _beat_of(self, rank: int) -> Beat | None:
        key = f"watchdog/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None


def _in_time(ask: Callable[[], None]) -> bool:
    """Whether the store has answered within STORE_PATIENCE_S.

    Its own time-out does not hold where packets vanish: a thread that waits in it is left behind.
    """
    done = threading.Event()

    def run() -> None:
        with suppress(RuntimeError):
            ask()
            done.set()

    asking = threading.Thread(target=run, name="watchdog's question", daemon=True)
    asking.start()
    asking.join(STORE_PATIENCE_S)
    return done.is_set()


def behind(beats: Sequence[Beat | None], waited_s: float) -> str:
    """Which ranks the others wait for, by each rank's last beat; None: it never had one.

    The ranks that entered the fewest phases; where those are several, the ones of them that wait for nobody.
    """
    silent = [rank for rank, beat in enumerate(beats) if beat is None]
    if silent:
        return f"{_ranks(silent)} not begun for {waited_s:.0f} s"
    known = [beat for beat in beats if beat is not None]
    fewest = min(beat.count for beat in known)
    last = [rank for rank, beat in enumerate(known) if beat.count == fewest]
    last = [rank for rank in last if not known[rank].waits] or last
    at = known[last[0]]
    return f"{_ranks(last)} not finished step {at.step}'s {at.phase} for {waited_s:.0f} s"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"


def waits_in_collective(frame: FrameType | None, depth: int = 8) -> bool:
    """Whether a thread is inside one of torch.distributed's functions, or waits for the end of one."""
    for _ in range(depth):
        if frame is None:
            return False
        if "distributed_c10d" in frame.f_code.co_filename or frame.f_code.co_qualname == "ReduceScatter.wait":
            return True
        frame = frame.f_back
    return False
