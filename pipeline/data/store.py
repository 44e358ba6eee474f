"""Where a data set's shards are: in a folder, or behind a URL with a cache on the local disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.data.store_cached import RemoteStore
from pipeline.data.store_remote import StoreConfig
from pipeline.errors import DataError

if TYPE_CHECKING:  # the manifest's verification reads through a store
    from pipeline.data.manifest import Manifest


class ShardFiles(Protocol):
    """Shards by file name, as a reader asks for them."""

    def local(self, name: str) -> Path:
        """Return where a shard stands on the local disk, whole; it stays there until it is released.

        Raises:
            DataError: it is missing, cannot be fetched, or is not what the manifest says.
        """
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to fetch shards that will be wanted, in that order, and return at once."""
        ...

    def release(self, name: str) -> None:
        """Say that a shard is not needed now; an open file of it can still be read."""
        ...


class ShardStore(ShardFiles, Protocol):
    """The shards of one data set, and what verification asks of them. Threads may share a store."""

    location: str  # folder or URL, for messages
    checks_sha256: bool  # whether `local` gives only files whose sha256 was found to be the manifest's

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the shards that are there, by name.

        Raises:
            DataError: the place cannot be listed.
        """
        ...

    def close(self) -> None:
        """End all fetching, and release everything."""
        ...


class LocalStore:
    """Shards in a folder, used where they stand."""

    checks_sha256 = False

    def __init__(self, folder: Path) -> None:
        self._folder, self.location = folder, str(folder)

    def local(self, name: str) -> Path:
        """Return the shard's path.

        Raises:
            DataError: it is missing.
        """
        path = self._folder / name
        if not path.is_file():
            raise DataError(f"shard {path} is missing; restore it, or delete the folder and pack again")
        return path

    def prefetch(self, names: Sequence[str]) -> None:
        """Do nothing: they are there."""

    def release(self, name: str) -> None:
        """Do nothing: they stay."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the files that are there, by name, by one look at the folder.

        Raises:
            DataError: the folder cannot be read.
        """
        wanted = set(names)
        try:
            with os.scandir(self._folder) as found:
                return {entry.name: entry.stat().st_size for entry in found if entry.name in wanted and entry.is_file()}
        except OSError as error:
            raise DataError(f"data set {self._folder} cannot be listed: {error.strerror}; restore it") from None

    def close(self) -> None:
        """Do nothing: nothing is held."""


def is_remote(location: str) -> bool:
    """Whether shards have to be fetched from there."""
    return "://" in location and not location.startswith("file://")


def open_store(location: str, manifest: Manifest, config: StoreConfig) -> ShardStore:
    """Open a data set's shards where they are.

    Args:
        location: a folder's path, or a URL that fsspec knows: s3://, gs://, http(s)://, file://.
        manifest: of the data set.
        config: of the cache, which a folder does not need.

    Raises:
        ConfigError: no such kind of URL is known, or the cache cannot hold a shard.
        DataError: the cache folder cannot be used.
    """
    if is_remote(location):
        return RemoteStore(location, manifest.shards, config)
    return LocalStore(Path(location.removeprefix("file://")))
