"""Packing: from a source to verified shards, as Ray tasks.

Stage 1 reads and decodes each part of the source into a spool file; the driver then knows every key and
identity, builds the table and draws one global shuffle; stage 2 gathers each shard's samples from the spool and
writes it. The same source and config give the same bytes, whatever the number of workers or their speed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from pydantic import Field

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.catalogue import Records, records_of, save_catalogue
from pipeline.data.manifest import FILE_NAME, IDENTITIES, Manifest, ShardEntry
from pipeline.data.shards import ShardIndex, index_path, write_shard
from pipeline.data.sources import Reject, Source
from pipeline.data.spool import Spooled, read_spooled, spool_part
from pipeline.errors import ClusterError, DataError, PipelineError
from pipeline.files import file_sha256, write_atomically
from pipeline.identities import IdentityTable
from pipeline.schema import Config

REJECTS = "rejects.jsonl"
SPOOL = ".spool"

Progress = Callable[[int, int, str], None]


class PackConfig(Config):
    """How samples are laid out in shards."""

    shard_size: int = Field(default=4096, ge=1, le=1_000_000, description="Images in a shard; the last may have fewer.")
    seed: int = Field(default=0, ge=0, description="Seed of the shuffle over all shards.")
    min_images: int = Field(default=1, ge=1, description="Identities with fewer images that decode are left out.")


@dataclass(frozen=True)
class _Layout:
    """The samples of all shards, in order: `files` (N,) and `spans` (N, 3) say where each lies in the spool."""

    paths: list[Path]
    files: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    table: IdentityTable
    rejects: list[Reject]


def pack(source: Source, destination: Path, config: PackConfig, progress: Progress | None = None) -> Manifest:
    """Pack a source into `destination`; a pack that is already there is returned as it is.

    Ray must be initialised, and every node must see `destination` under the same path. The spool lies in it while
    packing, so that it needs twice the room of the data set. The manifest is written last: a folder without one
    is an unfinished pack, and is packed again from the start.

    Args:
        source: what to pack.
        destination: folder of the data set.
        config: how to pack it.
        progress: called with (done, of how many, what is done) as the work goes on.

    Raises:
        DataError: the source is broken or has no image that decodes, or the destination holds another pack or
            cannot be written.
        ClusterError: Ray lost the tasks.
    """
    destination = destination.expanduser().resolve()
    report = progress or _silent
    fingerprint = source.fingerprint()
    if (destination / FILE_NAME).exists():
        return _finished(destination, fingerprint, config)
    try:
        _clear(destination)
        parts = _spool(source, destination, report)
        layout = _lay_out(source.name, parts, max(config.min_images, source.min_images), config.seed)
        shards = _write_shards(layout, destination, config.shard_size, report)
        save_catalogue(destination, (records for _, records in shards))
        layout.table.save(destination / IDENTITIES)
        lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in layout.rejects]
        write_atomically(destination / REJECTS, "".join(lines).encode())
        shutil.rmtree(destination / SPOOL)
        manifest = Manifest(
            folder=destination,
            name=source.name,
            source=fingerprint,
            pack=config.model_dump(mode="json"),
            samples=len(layout.files),
            identities_digest=layout.table.digest,
            identities_count=len(layout.table),
            rejects=_count(layout.rejects),
            shards=tuple(entry for entry, _ in shards),
            catalogue_sha256=file_sha256(destination / CATALOGUE),
        )
        manifest.save()
    except OSError as error:
        raise DataError(f"packing into {destination} failed: {error}; see to the disk, then pack again") from None
    return manifest


def _silent(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody watches."""


def _finished(destination: Path, fingerprint: str, config: PackConfig) -> Manifest:
    """Return the pack that is there, if it is of this source and config and whole."""
    manifest = Manifest.load(destination)
    for what, same in (
        ("source", manifest.source == fingerprint),
        ("pack config", manifest.pack == config.model_dump(mode="json")),
    ):
        if not same:
            raise DataError(
                f"{destination} holds {manifest.name!r}, packed from another {what}: "
                "choose another destination, or delete that folder"
            )
    manifest.verify(digests=False)
    return manifest


def _clear(destination: Path) -> None:
    """Remove what an unfinished pack left; files that are not of packing stay."""
    destination.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(destination / SPOOL, ignore_errors=True)
    for pattern in ("shard-*.tar", "shard-*.idx", "shard-*.tmp", CATALOGUE, IDENTITIES, REJECTS):
        for path in destination.glob(pattern):
            path.unlink()
    (destination / SPOOL).mkdir()


def _spool(source: Source, destination: Path, report: Progress) -> list[Spooled]:
    """Stage 1: one task a part."""
    handle = ray.put(source)
    task = ray.remote(spool_part)
    parts = source.parts()
    paths = [destination / SPOOL / f"part-{number:06d}" for number in range(len(parts))]
    futures = [task.remote(handle, part, path) for part, path in zip(parts, paths, strict=True)]
    return _gather(futures, report, "parts read and decoded")


def _lay_out(name: str, parts: list[Spooled], min_images: int, seed: int) -> _Layout:
    """Choose the identities, and put their samples in an order that depends on (seed, keys) alone."""
    keys = [key for part in parts for key in part.keys]
    identities = [identity for part in parts for identity in part.identities]
    rejects = [reject for part in parts for reject in part.rejects]
    if len(set(keys)) != len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"sample key {twice!r} stands twice in source {name}; keys must be unique: mend the source")
    count = Counter(identities)
    reason = f"identity has fewer than {min_images} images"
    pairs = zip(keys, identities, strict=True)
    rejects += [Reject(key, identity, reason) for key, identity in pairs if count[identity] < min_images]
    kept = [place for place, identity in enumerate(identities) if count[identity] >= min_images]
    if not kept:
        reasons = ", ".join(f"{number} x {why}" for why, number in _count(rejects).items())
        raise DataError(f"source {name} has no image that can be packed ({reasons or 'no image at all'}); look there")
    kept.sort(key=lambda place: hashlib.sha256(f"pack:{seed}:{keys[place]}".encode()).digest())
    files = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    spans = np.concatenate([np.empty((0, 3), np.int64), *(part.spans for part in parts)])
    table = IdentityTable.from_keys(identities[place] for place in kept)
    rejects.sort(key=lambda reject: (reject.key, reject.identity))
    return _Layout([part.path for part in parts], files[kept], spans[kept], table, rejects)


def _write_shards(
    layout: _Layout, destination: Path, shard_size: int, report: Progress
) -> list[tuple[ShardEntry, Records]]:
    """Stage 2: one task a shard."""
    table, task = ray.put(layout.table), ray.remote(_write_one)
    paths = ray.put(layout.paths)
    futures = []
    for number, start in enumerate(range(0, len(layout.files), shard_size)):
        chosen = slice(start, start + shard_size)
        tar = destination / f"shard-{number:06d}.tar"
        futures.append(task.remote(tar, paths, layout.files[chosen], layout.spans[chosen], table))
    return _gather(futures, report, "shards written")


def _write_one(
    tar: Path,
    paths: list[Path],
    files: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    table: IdentityTable,
) -> tuple[ShardEntry, Records]:
    """Write one shard, and describe it and its samples."""
    samples = write_shard(tar, read_spooled(paths, files.tolist(), spans.tolist()), table)
    entry = ShardEntry(
        name=tar.name,
        samples=samples,
        bytes=tar.stat().st_size,
        tar_sha256=file_sha256(tar),
        index_sha256=file_sha256(index_path(tar)),
    )
    return entry, records_of(ShardIndex.load(tar, index_path(tar), len(table)))


def _gather(futures: list[Any], report: Progress, what: str) -> list[Any]:
    """Wait for all tasks, telling of each; on the first failure cancel the rest and raise its cause."""
    waiting = list(futures)
    report(0, len(futures), what)
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            ray.get(done)
            report(len(futures) - len(waiting), len(futures), what)
        return list(ray.get(futures))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError | OSError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(f"packing: Ray lost a task ({reason}); look at Ray's logs, then pack again") from None
    finally:
        for future in waiting:
            ray.cancel(future)


def _count(rejects: list[Reject]) -> dict[str, int]:
    """Rejects by reason."""
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))
