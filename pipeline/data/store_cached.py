"""A data set's shards behind a URL, in a cache on the local disk: fetched ahead, checked, and held while used."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Sequence
from enum import Enum
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.store_cache import ShardCache
from pipeline.data.store_remote import ClosedError, Remote, StoreConfig
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:  # the manifest's verification reads through a store
    from pipeline.data.manifest import ShardEntry

POLL_S = 0.05  # between two looks at what another process fetches, or at the room that it may have left
ROOM_POLL_S = 1.0  # the same, for what is not needed yet
CLOSE_S = 5.0  # that closing waits for a fetch to notice


class _Outcome(Enum):
    """Of an attempt to fetch a shard into the cache."""

    FETCHED = "it is there"
    ELSEWHERE = "another thread or process is fetching it"
    NO_ROOM = "all that could be evicted is in use"


class RemoteStore:
    """Shards behind a URL, fetched into a cache that the processes of a node share, checked, and held while used.

    A cached file's name has its shard's sha256: two data sets never take each other's shards for their own.

    Args:
        url: of the data set's folder.
        shards: name, bytes and sha256 of each, from the manifest.
        config: of cache and patience.

    Raises:
        ConfigError: the cache is smaller than a shard, or the URL is of an unknown kind.
        DataError: the cache folder cannot be used.
    """

    checks_sha256 = True

    def __init__(self, url: str, shards: Sequence[ShardEntry], config: StoreConfig) -> None:
        largest = max(shards, key=lambda shard: shard.bytes)
        if largest.bytes > config.cache_bytes:
            raise ConfigError(
                f"cache_bytes is {config.cache_bytes}, less than the {largest.bytes} of shard {largest.name}; raise it"
            )
        self._shards = {shard.name: shard for shard in shards}
        self._config, self._remote = config, Remote(url, config)
        self.location = self._remote.url
        self._cache = ShardCache(config.cache, config.cache_bytes)
        self._pins: dict[str, int] = {}
        self._ahead: set[str] = set()  # asked for by prefetch, and neither used nor released since
        self._guard = threading.Lock()  # of the two above
        self._released = threading.Event()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def local(self, name: str) -> Path:
        """Fetch a shard unless it is there, and hold it until it is released.

        Raises:
            DataError: it cannot be fetched or is not what the manifest says; or others hold the whole cache.
        """
        with self._guard:
            held = name in self._pins
        if not held:
            self._hold(name, self._pinned(name))
        return self._cache.folder / self._file(name)

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to fetch shards, in that order, as far as the cache has room; failures are told by `local`."""
        with self._guard:
            fresh = [name for name in names if name not in self._pins and name not in self._ahead]
            self._ahead.update(fresh)
            while fresh and len(self._workers) < self._config.threads:
                self._workers.append(threading.Thread(target=self._work, name="shard-prefetch", daemon=True))
                self._workers[-1].start()
        for name in fresh:
            self._queue.put(name)

    def release(self, name: str) -> None:
        """Let go of a shard, or of the wish for it; it stays in the cache until its room is needed."""
        with self._guard:
            self._ahead.discard(name)
            pin = self._pins.pop(name, None)
        if pin is not None:
            os.utime(pin)
            os.close(pin)
            self._released.set()

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the shards that are there, by name; one listing.

        Raises:
            DataError: the folder cannot be listed.
        """
        return self._remote.sizes(names)

    def close(self) -> None:
        """End the fetching and let go of every shard; what was fetched stays for the next one."""
        self._remote.close()
        self._released.set()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join(CLOSE_S)
        for name in list(self._pins):
            self.release(name)

    def _file(self, name: str) -> str:
        """Name of a shard's file in the cache."""
        return f"{self._shards[name].tar_sha256[:16]}-{name}"

    def _hold(self, name: str, pin: int) -> None:
        with self._guard:
            self._ahead.discard(name)
            kept = self._pins.setdefault(name, pin)
        if kept != pin:  # another thread was quicker
            os.close(pin)

    def _pinned(self, name: str) -> int:
        """Hold a shard's file, fetching it as often as it is evicted before it can be held."""
        shard, waited_s = self._shards[name], 0.0
        while (pin := self._cache.pin(self._file(name), shard.bytes)) is None:
            outcome = self._fetch(shard, urgent=True)
            if outcome is _Outcome.FETCHED:
                continue
            waited_s = waited_s + POLL_S if outcome is _Outcome.NO_ROOM else 0.0
            if waited_s > self._config.timeout_s:
                raise DataError(
                    f"cache {self._cache.folder} has no room for shard {name}: this node's processes use all of its "
                    f"{self._config.cache_bytes} bytes at once; raise cache_bytes, or mix fewer shards in a block"
                )
            self._remote.pause(POLL_S)
        return pin

    def _fetch(self, shard: ShardEntry, urgent: bool) -> _Outcome:
        """Fetch a shard into the cache; `urgent` evicts even what prefetch asked for."""
        file = self._file(shard.name)
        with self._guard:
            spared = {self._file(name) for name in self._ahead}
        try:
            with self._cache.filling(file) as stream:
                if stream is None:
                    return _Outcome.ELSEWHERE
                if self._cache.touch(file):  # another had finished it just before
                    return _Outcome.FETCHED
                if not self._cache.reserve(stream, shard.bytes, spared, urgent):
                    return _Outcome.NO_ROOM
                self._download(shard, stream)
                self._cache.finish(file, stream)
                return _Outcome.FETCHED
        except OSError as error:
            raise DataError(
                f"shard {shard.name} cannot be kept in cache {self._cache.folder}: {error.strerror}; free the disk"
            ) from None

    def _download(self, shard: ShardEntry, stream: BufferedRandom) -> None:
        """Write a shard's bytes to a stream, until they are those that the manifest means."""
        for pause in self._remote.pauses():
            stream.seek(0)
            self._remote.download(shard.name, shard.bytes, stream)
            stream.flush()
            stream.seek(0)
            if hashlib.file_digest(stream, "sha256").hexdigest() == shard.tar_sha256:
                return
            if pause is not None:
                self._remote.pause(pause)
        raise DataError(
            f"shard {shard.name} at {self._remote.url} was fetched {self._config.retries + 1} times, but its sha256 is "
            "never the manifest's; upload it again, with its manifest"
        )

    def _work(self) -> None:
        """Fetch what is queued, until closed."""
        while (name := self._queue.get()) is not None:
            try:
                self._fetch_ahead(name)
            except ClosedError:
                return
            except DataError:  # whoever needs the shard tries again, and tells it
                with self._guard:
                    self._ahead.discard(name)

    def _fetch_ahead(self, name: str) -> None:
        """Fetch a shard once there is room for it, unless it is no longer wanted."""
        while name in self._ahead and not self._cache.touch(self._file(name)):
            if self._fetch(self._shards[name], urgent=False) is not _Outcome.FETCHED:
                self._released.wait(ROOM_POLL_S)
                self._released.clear()
                self._remote.pause(0)
