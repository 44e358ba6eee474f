"""Whether a data set is the one that was packed, asked before the first step: a wrong sample is never trained on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.catalogue import Catalogue
from pipeline.data.shards import index_path
from pipeline.data.store import LocalStore, ShardStore
from pipeline.errors import DataError
from pipeline.files import file_sha256

if TYPE_CHECKING:  # a manifest offers its own verification
    from pipeline.data.manifest import Manifest, ShardEntry

Digests = Literal["none", "background", "all"]
CHANGED = "it was changed after packing; pack again or restore it"
LOST = "restore it, or delete the folder and pack again"
THREADS = 4  # that hash files at once
CHUNK = 1 << 20  # records of the catalogue looked at together, about 50 MB with what is computed of them


class Verification:
    """What is still going on of a verification: nothing, or a thread that reads tars.

    Args:
        store: of the shards.
        entries: the shards whose bytes are still to be compared.
    """

    def __init__(self, store: ShardStore, entries: Sequence[ShardEntry]) -> None:
        self._store, self._entries = store, entries
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
        if entries:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def raise_if_broken(self) -> None:
        """Raise what was found until now; call it now and then, as at every checkpoint.

        Raises:
            DataError: a shard's bytes are not those that were packed.
        """
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for the end of the reading, then do as `raise_if_broken`."""
        if self._entries:
            self._thread.join()
        self.raise_if_broken()

    def close(self) -> None:
        """End the reading, after the tar that it is at."""
        self._stopped.set()
        if self._entries:
            self._thread.join()

    def _run(self) -> None:
        try:
            for entry in self._entries:
                if self._stopped.is_set():
                    return
                _check_tar(self._store, entry)
        except Exception as error:  # noqa: BLE001 - raised in the thread that asks
            self._error = error


def verify(manifest: Manifest, digests: Digests, store: ShardStore | None = None) -> Verification:
    """Check that a data set is the one that was packed.

    Always: that every tar is there with its size, the identity table, the catalogue (each sample within its tar, each
    label within the table) and every index's bytes. The tars' bytes by `digests`: not at all, in a thread while
    training runs, or now. A store that compares what it fetches needs no background: `background` does nothing more.

    Args:
        manifest: in a folder with catalogue, identity table and indices.
        digests: when tars are read.
        store: where the tars are; none: in the manifest's folder.

    Returns:
        Ask it now and then whether the background found anything.

    Raises:
        DataError: names the first file that is missing or changed, or the first sample that cannot be.
    """
    store = store or LocalStore(manifest.folder)
    _check_sizes(manifest, store)
    manifest.identities()
    _check_catalogue(manifest)
    _check_indices(manifest)
    if digests == "all":
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            deque(pool.map(lambda entry: _check_tar(store, entry), manifest.shards), maxlen=0)
    background = digests == "background" and not store.checks_sha256
    return Verification(store, manifest.shards if background else ())


def _check_sizes(manifest: Manifest, store: ShardStore) -> None:
    """Every tar's presence and size, by one listing."""
    sizes = store.sizes([entry.name for entry in manifest.shards])
    missing = [entry.name for entry in manifest.shards if entry.name not in sizes]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(manifest.shards)})" if len(missing) > 1 else ""
        raise DataError(f"shard {store.location}/{missing[0]} is missing{more}; {LOST}")
    for entry in manifest.shards:
        if sizes[entry.name] != entry.bytes:
            raise DataError(
                f"shard {store.location}/{entry.name} has {sizes[entry.name]} bytes, not {entry.bytes}: {CHANGED}"
            )


def _check_catalogue(manifest: Manifest) -> None:
    """Every sample's bytes and label, then the file's own."""
    samples = np.array([entry.samples for entry in manifest.shards], np.int64)
    tar_bytes = np.array([entry.bytes for entry in manifest.shards], np.int64)
    catalogue = Catalogue.load(manifest.folder, samples)
    for start in range(0, len(catalogue.records), CHUNK):
        part = catalogue.records[start : start + CHUNK]
        edges = np.clip(catalogue.starts - start, 0, len(part))
        limits = np.repeat(tar_bytes, np.diff(edges))
        inside = (part["offset"] >= BLOCKSIZE) & (part["size"] >= 1) & (part["size"] <= limits - part["offset"])
        known = (part["row"] >= 0) & (part["row"] < manifest.identities_count)
        if not (inside & known).all():
            place = int(np.argmin(inside & known))
            shard = int(np.searchsorted(catalogue.starts, start + place, side="right")) - 1
            where = f"sample {start + place - catalogue.starts[shard]} of shard {manifest.shards[shard].name}"
            raise DataError(_impossible(manifest, where, part[place], int(limits[place])))
    path = manifest.folder / CATALOGUE
    if _sha256(path) != manifest.catalogue_sha256:
        raise DataError(f"catalogue {path} has another sha256: {CHANGED}")


def _impossible(manifest: Manifest, where: str, record: np.void, limit: int) -> str:
    """Say what is wrong with a sample's record."""
    offset, size, row = (int(record[field]) for field in ("offset", "size", "row"))
    what = (
        f"label {row}, but the identity table has {manifest.identities_count} rows"
        if not 0 <= row < manifest.identities_count
        else f"{size} bytes from byte {offset} on, but the tar has {limit}"
    )
    return f"catalogue {manifest.folder / CATALOGUE}: {where} has {what}; {LOST}"


def _check_indices(manifest: Manifest) -> None:
    """Every index's bytes."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        deque(pool.map(lambda entry: _check_index(manifest, entry), manifest.shards), maxlen=0)


def _check_index(manifest: Manifest, entry: ShardEntry) -> None:
    path = index_path(manifest.folder / entry.name)
    if _sha256(path) != entry.index_sha256:
        raise DataError(f"index {path} has another sha256: {CHANGED}")


def _check_tar(store: ShardStore, entry: ShardEntry) -> None:
    """A tar's bytes, held only while they are read."""
    path = store.local(entry.name)
    try:
        if _sha256(path) != entry.tar_sha256:
            raise DataError(f"shard {path} has another sha256: {CHANGED}")
    finally:
        store.release(entry.name)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {LOST}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; see to the disk") from None
