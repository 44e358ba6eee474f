"""The small files of a data set behind a URL, fetched into a local folder that looks like the data set's own."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.manifest import FILE_NAME, Manifest, ShardEntry
from pipeline.data.shards import index_path
from pipeline.data.store import is_remote
from pipeline.data.store_remote import Remote, StoreConfig
from pipeline.errors import DataError
from pipeline.files import file_sha256, write_atomically
from pipeline.identities import IdentityTable

AT_ONCE = 16  # small files


def metadata_folder(location: str, config: StoreConfig) -> Path:
    """The local folder with a data set's small files: its own, or one that they are fetched into.

    Raises:
        ConfigError: no such kind of URL is known.
        DataError: a file cannot be fetched, or is not what the manifest says.
    """
    return fetch_metadata(location, config) if is_remote(location) else Path(location.removeprefix("file://"))


def fetch_metadata(url: str, config: StoreConfig) -> Path:
    """Fetch manifest, catalogue, identity table and indices of a data set, all but its tars.

    The manifest is always asked for again; the rest is kept in `<cache>.metadata/`, by the manifest's sha256.

    Args:
        url: of the data set's folder.
        config: of the cache and patience.

    Returns:
        A folder for `Manifest.load`.

    Raises:
        ConfigError: no such kind of URL is known.
        DataError: a file is not there, cannot be fetched or kept, or is not what the manifest says.
    """
    with Remote(url, config) as remote:
        content = remote.read(FILE_NAME)
        folder = config.cache.with_name(f"{config.cache.name}.metadata") / hashlib.sha256(content).hexdigest()[:32]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                write_atomically(folder / FILE_NAME, content)
                _fetch_rest(remote, _load(remote.url, folder))
        except OSError as error:
            raise DataError(f"folder {folder} cannot be written: {error.strerror}; free the disk") from None
    return folder


def _load(url: str, folder: Path) -> Manifest:
    try:
        return Manifest.load(folder)
    except DataError as error:
        raise DataError(f"data set at {url}: {error}") from None


def _fetch_rest(remote: Remote, manifest: Manifest) -> None:
    """Fetch what the manifest names and the folder lacks."""
    folder = manifest.folder

    def catalogue(stream: BinaryIO) -> None:
        remote.download(CATALOGUE, remote.size(CATALOGUE), stream)

    def is_the_table(path: Path) -> bool:
        try:
            return IdentityTable.load(path).digest == manifest.identities_digest
        except DataError:
            return False

    def fetch_index(entry: ShardEntry) -> None:
        path = index_path(folder / entry.name)
        _fetch(remote, path, _whole(remote, path), lambda part: file_sha256(part) == entry.index_sha256)

    table = folder / manifest.identities_file
    _fetch(remote, table, _whole(remote, table), is_the_table)
    _fetch(remote, folder / CATALOGUE, catalogue, lambda part: file_sha256(part) == manifest.catalogue_sha256)
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        deque(pool.map(fetch_index, manifest.shards), maxlen=0)


def _whole(remote: Remote, path: Path) -> Callable[[BinaryIO], object]:
    return lambda stream: stream.write(remote.read(path.name))


def _fetch(remote: Remote, path: Path, fetch: Callable[[BinaryIO], object], is_right: Callable[[Path], bool]) -> None:
    """Fetch a file unless it is there, until it is the right one."""
    if path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    try:
        for pause in remote.pauses():
            with part.open("wb") as stream:
                fetch(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if is_right(part):
                part.replace(path)
                return
            if pause is not None:
                remote.pause(pause)
    finally:
        part.unlink(missing_ok=True)
    raise DataError(f"{path.name} at {remote.url} is not the manifest's, however often fetched; upload both again")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep the node's other processes from fetching the same files."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
