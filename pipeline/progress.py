"""How far a job is, as lines that a program reads: from a job on a cluster to whoever has submitted it.

A line is PREFIX and a JSON object: `{"name": "v1", "done": 40, "total": 600, "unit": "steps", "words": "loss v1 2.1"}`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass

from pipeline.files import parse_json

ASKED = "BCT_PROGRESS"  # the environment variable; its value is `lines`
PREFIX = "@progress "
EVERY_S = 0.5


@dataclass(frozen=True)
class Far:
    """How far one thing is."""

    name: str
    done: int
    total: int
    unit: str
    words: str


class Lines:
    """Takes what a bar takes, and prints it as lines."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit, self.told = name, total, unit, 0.0

    def __call__(self, done: int, words: str) -> None:
        """Print how far it is, if that was not just done."""
        now = time.monotonic()
        if done < self.total and now - self.told < EVERY_S:
            return
        self.told = now
        far = Far(self.name, done, self.total, self.unit, words)
        print(f"{PREFIX}{json.dumps(asdict(far), ensure_ascii=False)}", flush=True)


def parsed(line: str) -> Far | None:
    """What a line says; None if it is another one."""
    if not line.startswith(PREFIX):
        return None
    try:
        found = parse_json(line.removeprefix(PREFIX))
        return Far(str(found["name"]), int(found["done"]), int(found["total"]), str(found["unit"]), str(found["words"]))
    except (ValueError, KeyError, TypeError):
        return None


def asked() -> bool:
    """Whether whoever has started this job reads such lines."""
    return os.environ.get(ASKED) == "lines"
