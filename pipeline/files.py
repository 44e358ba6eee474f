"""Writing so that a reader sees the old thing, the new thing, or nothing: never half."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may come from anybody.

    Raises:
        ValueError: it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        stream.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, indented, for people to read."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n").encode())


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when the block ends, on disk; if the block fails, nothing is left.

    Two processes may write the same file at once: each has a temporary one of its own.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
