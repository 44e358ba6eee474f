"""Samples that a running training could not decode: written down, replaced, and counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.reading import BadSample
from pipeline.errors import DataError

FILES = "quarantine-*.jsonl"


class Quarantine:
    """What is known not to decode, on this rank and from the runs before.

    Args:
        folder: of the files, one a rank; None: nothing is written down.
        rank: this rank.
        limit: samples after which the run gives up.
    """

    def __init__(self, folder: Path | None, rank: int, limit: int) -> None:
        self._folder, self._rank, self._limit = folder, rank, limit
        self._known = {(entry["shard"], entry["key"]) for entry in read_quarantine(folder)} if folder else set()
        self._places: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def holds(self, shard: str, place: int) -> bool:
        """Whether a sample met in this process is known."""
        return (shard, place) in self._places

    def add(self, samples: Sequence[BadSample], step: int) -> None:
        """Write down the samples that a batch failed on.

        Raises:
            DataError: there are too many.
        """
        for sample in samples:
            self._places.add((sample.shard, sample.place))
            if (sample.shard, sample.key) not in self._known:
                self._known.add((sample.shard, sample.key))
                self._write(sample, step)
        if len(self._known) > self._limit:
            last = samples[-1]
            raise DataError(
                f"{len(self._known)} samples do not decode, more than data.quarantine_limit={self._limit}; last: "
                f"{last.key!r} of shard {last.shard} at step {step}: {last.reason}; mend the data or raise the limit"
            )

    def _write(self, sample: BadSample, step: int) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = {"shard": sample.shard, "key": sample.key, "reason": sample.reason, "step": step}
        with (self._folder / f"quarantine-{self._rank:05d}.jsonl").open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def read_quarantine(folder: Path) -> list[dict[str, str]]:
    """Entries of all ranks: shard, key, reason, step. A line that a killed process left half is passed over."""
    entries = []
    for path in sorted(folder.glob(FILES)):
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries
