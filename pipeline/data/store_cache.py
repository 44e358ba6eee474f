"""Fetched shards on a node's disk: bounded, shared by its processes, and never half there.

Every lock is a `flock`, which the kernel drops with the process that held it, however that ended:

- a file in use is held by a shared lock on itself, so that nobody evicts it;
- a file being fetched is `<name>.part`, locked by who fetches it, and renamed once it is whole. It has its final
  size from the start, so that the room it will take is counted. A part that nobody locks was left by a process that
  was killed, and is removed by whoever meets it;
- `.lock` guards the decision about room.

The folder must be on a local disk: network file systems do not all keep these promises.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError

PART, LOCK = ".part", ".lock"


class _Entry(NamedTuple):
    path: Path
    size: int
    used_ns: int


def _lock_at_once(file: int) -> bool:
    """Take the lock that nobody shares, unless another descriptor has one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still has that name: between open and lock it may have lost it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_free(path: Path) -> bool:
    """Remove a file that nobody has locked; whether it is gone."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not _lock_at_once(file):
            return False
        if _is_at(file, path):
            path.unlink()
        return True
    finally:
        os.close(file)


class ShardCache:
    """A folder of at most `limit` bytes, from which the least recently used files go first.

    Args:
        folder: made if it is not there.
        limit: bytes.

    Raises:
        DataError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._entries()
        except OSError as error:
            raise DataError(f"cache folder {folder} cannot be used: {error.strerror}; choose another") from None

    def pin(self, name: str, size: int) -> int | None:
        """Hold a file, so that it stays until the returned descriptor is closed; None if it is not there, whole."""
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for an evictor at most, who is quick
        about = os.fstat(file)
        if about.st_nlink and about.st_size == size:
            os.utime(file)
            return file
        if about.st_nlink:  # someone cut it; who holds it open keeps what he has
            (self.folder / name).unlink(missing_ok=True)
        os.close(file)
        return None

    def touch(self, name: str) -> bool:
        """Make a file the most recently used; False if it is not there."""
        try:
            os.utime(self.folder / name)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def filling(self, name: str) -> Iterator[BufferedRandom | None]:
        """Take the right to fetch a file; None while another thread or process has it.

        The file appears when `finish` was called on the stream, and else leaves nothing.
        """
        path = self.folder / f"{name}{PART}"
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:  # it may be another's still
            if not _lock_at_once(stream.fileno()) or not _is_at(stream.fileno(), path):
                yield None
                return
            try:
                yield stream
            finally:
                if _is_at(stream.fileno(), path):
                    path.unlink()

    def reserve(self, stream: BufferedRandom, size: int, spared: Collection[str], urgent: bool) -> bool:
        """Make room for a file being fetched, evicting files that nobody holds.

        Args:
            stream: from `filling`; it is extended to `size`.
            size: bytes of the whole file.
            spared: files that are wanted soon.
            urgent: evict those too, after all others.

        Returns:
            Whether there is room now.
        """
        with self._alone():
            entries = self._entries()
            used = sum(entry.size for entry in entries)
            loose = [entry for entry in entries if not entry.path.name.endswith(PART)]
            for entry in sorted(loose, key=lambda entry: (entry.path.name in spared, entry.used_ns)):
                if used + size <= self._limit or (entry.path.name in spared and not urgent):
                    break
                if _remove_if_free(entry.path):
                    used -= entry.size
            if used + size > self._limit:
                return False
            os.ftruncate(stream.fileno(), size)
            return True

    def finish(self, name: str, stream: BufferedRandom) -> None:
        """Give a fetched file its name."""
        stream.flush()
        os.fsync(stream.fileno())
        with self._alone():  # who counts sees it under one name or the other
            (self.folder / f"{name}{PART}").rename(self.folder / name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _entries(self) -> list[_Entry]:
        """Every file that counts; parts that nobody is filling are removed."""
        entries = []
        for found in os.scandir(self.folder):
            path = Path(found.path)
            if found.name == LOCK or (found.name.endswith(PART) and _remove_if_free(path)):
                continue
            try:
                about = found.stat()
            except FileNotFoundError:  # a part that was finished or given up meanwhile
                continue
            entries.append(_Entry(path, about.st_size, about.st_mtime_ns))
        return entries
