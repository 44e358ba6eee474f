"""The figures of a run in a file: what was reported outlives its process, and a server that is down."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.files import parse_json
from pipeline.tracking.store import metric_key


class Value(NamedTuple):
    """A point of a metric's curve."""

    key: str
    value: float
    timestamp: int  # ms since the epoch
    step: int


class Journal:
    """One JSON line a report. A run that resumes appends what it reports again; readers leave that out.

    Args:
        path: of the file; its folder is there, and shared by all nodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mended = False

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of one step. They are on the disk, or with NFS's server, before any later checkpoint is.

        Raises:
            OSError: the disk is full, or gone.
        """
        named = {metric_key(name): float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": named}) + "\n"
        with self._lock, self.path.open("ab") as stream:
            stream.write(("" if self._mended else self._end_of_torn_line()).encode() + line.encode())
            self._mended = True

    def read(self, start: int, most: int) -> tuple[list[Value], int]:
        """Values from a place in the file on, of whole lines: as many as `most`, or a line's more; and where they end.

        Lines that were cut off when their writer was killed are passed over.
        """
        values: list[Value] = []
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return values, start
        with stream:
            stream.seek(start)
            while len(values) < most and (line := stream.readline()).endswith(b"\n"):
                start += len(line)
                values += _values(line)
        return values, start

    def _end_of_torn_line(self) -> str:
        with self.path.open("rb") as stream:
            if not (size := stream.seek(0, 2)):
                return ""
            stream.seek(size - 1)
            return "" if stream.read() == b"\n" else "\n"


def _values(line: bytes) -> list[Value]:
    try:
        entry = parse_json(line)
        return [Value(key, float(value), entry["time"], entry["step"]) for key, value in entry["metrics"].items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
