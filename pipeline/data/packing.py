"""Packing: from a source to verified shards, as Ray tasks.

Stage 1 reads and decodes each part of the source into a spool file; the driver then knows every key and
identity, builds the table and draws one global shuffle; stage 2 gathers each shard's samples from the spool and
writes it. The same source and config give the same bytes, whatever the number of workers or their speed, and
whether or not the pack was killed on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.catalogue import Records
from pipeline.data.finishing import PackedSet, choose_identities, count_rejects, describe_shard, finish, finished
from pipeline.data.manifest import FILE_NAME, IDENTITIES, Manifest, ShardEntry
from pipeline.data.protocols import FILES as PROTOCOL_FILES
from pipeline.data.protocols import EvaluationSource, save_protocol
from pipeline.data.shards import index_path, write_shard
from pipeline.data.sources import Source
from pipeline.data.spool import (
    REJECTS,
    SAMPLES,
    ReadConfig,
    read_columns,
    read_spooled,
    rejects_path,
    samples_path,
    spool_part,
)
from pipeline.data.tasks import Progress, run_tasks, silent
from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.identities import IdentityTable
from pipeline.schema import digest_json

SPOOL = ".spool"
STATE = "state.json"
SPOOL_FORMAT = 1  # raise it when a spool that an older version left cannot be used
HEADERS = 4 * 512  # of a sample's three members, and the block that holds its row
TAR_END = 1024 + 10_240  # the mark of a tar's end, and what fills it up to whole records

Ints = npt.NDArray[np.int64]


class PackConfig(ReadConfig):
    """What is packed of a source, and how samples are laid out in shards."""

    shard_size: int = Field(default=4096, ge=1, le=1_000_000, description="Images in a shard; the last may have fewer.")
    shard_bytes: int | None = Field(
        default=None,
        ge=65_536,
        description="No shard has more bytes, unless one image alone has; no limit if not given.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the shuffle over all shards.")


@dataclass(frozen=True)
class _Layout:
    """The N samples of all shards, in order.

    Attributes:
        files: (N,) int32, number of the spool file.
        spans: (N, 3) int64, as `read_spooled` takes them.
        rows: (N,) int32, of the identity in the table.
        sizes: (N, 2) int32, width and height in pixels.
        table: the identities.
        rejects: columns of REJECTS.
    """

    files: npt.NDArray[np.int32]
    spans: Ints
    rows: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    table: IdentityTable
    rejects: pa.Table


def pack(source: Source, destination: Path, config: PackConfig, progress: Progress | None = None) -> Manifest:
    """Pack a source into `destination`; a pack that is already there is returned as it is.

    Ray must be initialised, and every node must see `destination` under the same path. The spool lies in it while
    packing, so that it needs twice the room of the data set. The manifest is written last: a folder without one
    is an unfinished pack, and is gone on with. The driver needs about 130 bytes of memory for each sample.

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
    report = progress or silent
    fingerprint = source.fingerprint()
    try:
        if (destination / FILE_NAME).exists():
            manifest = finished(destination, fingerprint, config)
        else:
            _prepare(destination, fingerprint, source.parts(), config)
            manifest = _pack(source, fingerprint, destination, config, report)
        shutil.rmtree(destination / SPOOL, ignore_errors=True)
    except OSError as error:
        raise DataError(f"packing into {destination} failed: {error}; see to the disk, then pack again") from None
    return manifest


def _pack(source: Source, fingerprint: str, destination: Path, config: PackConfig, report: Progress) -> Manifest:
    paths = _spool(source, destination, config, report)
    layout = _lay_out(source.name, paths, max(config.min_images, source.min_images))
    shards = _write_shards(layout, paths, destination, config, report)
    if isinstance(source, EvaluationSource):
        _write_protocol(source, paths, layout.rejects, destination)
    packed = PackedSet(source.name, fingerprint, layout.table, shards, layout.rejects, layout.sizes)
    return finish(destination, packed, config)


def _write_protocol(source: EvaluationSource, paths: list[Path], rejects: pa.Table, destination: Path) -> None:
    """What is compared, beside the shards.

    Raises:
        DataError: it speaks of a sample that was rejected.
    """
    protocol, keys = source.protocol(), read_columns(map(samples_path, paths), SAMPLES)["key"]
    protocol.require(keys.filter(pc.invert(pc.is_in(keys, value_set=rejects["key"].combine_chunks()))).to_pylist())
    save_protocol(destination, protocol)


def _prepare(destination: Path, fingerprint: str, parts: list[str], config: PackConfig) -> None:
    """Keep of an unfinished pack what this one would make again, and remove the rest; other files stay.

    Raises:
        DataError: there are shards that no unfinished pack accounts for.
    """
    spool, state = destination / SPOOL, destination / SPOOL / STATE
    if not spool.is_dir() and (strangers := sorted(destination.glob("shard-*.tar"))):
        raise DataError(
            f"{destination} holds {strangers[0].name}, but neither a manifest nor an unfinished pack; "
            "choose another destination, or delete that folder if nobody needs it"
        )
    reading = config.model_dump(mode="json", exclude={"shard_size", "shard_bytes", "min_images"})
    spool_digest = digest_json([SPOOL_FORMAT, fingerprint, parts, reading])
    now = {"spool": spool_digest, "pack": digest_json([spool_digest, config.model_dump(mode="json")])}
    before = _read_state(state)
    if before != now:
        state.unlink(missing_ok=True)  # first: what is half removed must not be gone on with
        for pattern in ("shard-*.tar", "shard-*.idx", CATALOGUE, IDENTITIES, *PROTOCOL_FILES):
            for path in destination.glob(pattern):
                path.unlink()
        if before.get("spool") != now["spool"]:
            shutil.rmtree(spool, ignore_errors=True)
    for path in (*destination.glob(".shard-*.tmp"), *spool.glob(".*.tmp")):
        path.unlink(missing_ok=True)
    spool.mkdir(parents=True, exist_ok=True)
    write_json(state, now)


def _read_state(path: Path) -> dict[str, Any]:
    """What the unfinished pack was of; nothing if there is none or it cannot be told."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _spool(source: Source, destination: Path, config: PackConfig, report: Progress) -> list[Path]:
    """Stage 1: one task a part."""
    handle, parts = ray.put(source), source.parts()
    paths = [destination / SPOOL / f"part-{number:06d}" for number in range(len(parts))]
    arguments = ((handle, part, path, config, config.seed) for part, path in zip(parts, paths, strict=True))
    run_tasks(spool_part, arguments, len(parts), report, "parts read and decoded")
    return paths


def _lay_out(name: str, paths: list[Path], min_images: int) -> _Layout:
    """Choose the identities, and put their samples in an order that depends on (seed, keys) alone."""
    samples = read_columns(map(samples_path, paths), SAMPLES)
    rejects = read_columns(map(rejects_path, paths), REJECTS)
    high, low = samples["high"].to_numpy(), samples["low"].to_numpy()
    order = np.lexsort((low, high))
    twice = np.flatnonzero((high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]]))
    if len(twice):
        key = samples["key"][int(order[twice[0]])].as_py()
        raise DataError(f"sample key {key!r} stands twice in source {name}; keys must be unique: mend the source")
    del high, low
    table, rows, few = choose_identities(samples["identity"], min_images)
    rejects = pa.concat_tables([rejects, _dropped(samples, np.flatnonzero(rows < 0), few)])
    if table is None:
        reasons = ", ".join(f"{number} x {why}" for why, number in count_rejects(rejects).items())
        raise DataError(f"source {name} has no image that can be packed ({reasons or 'no image at all'}); look there")
    order = order[rows[order] >= 0]
    counts = [pa.ipc.open_file(str(samples_path(path))).read_all().num_rows for path in paths]
    files = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
    spans = np.empty((len(order), 3), np.int64)
    for column, field in enumerate(("offset", "about", "image")):
        spans[:, column] = samples[field].to_numpy()[order]
    sizes = np.stack([samples[field].to_numpy()[order] for field in ("width", "height")], axis=1)
    return _Layout(files[order], spans, rows[order], sizes, table, rejects)


def _dropped(samples: pa.Table, places: Ints, reason: str) -> pa.Table:
    """Rejects of the samples at `places`, whose identity is left out."""
    columns = samples.select(["key", "identity"]).take(places)
    return columns.append_column("reason", pa.array([reason] * len(places), pa.string()))


def _write_shards(
    layout: _Layout, paths: list[Path], destination: Path, config: PackConfig, report: Progress
) -> list[tuple[ShardEntry, Records]]:
    """Stage 2: one task a shard."""
    edges = shard_edges(layout.spans, config.shard_size, config.shard_bytes)
    handle, keys = ray.put(paths), layout.table.keys

    def arguments() -> Iterator[tuple[Any, ...]]:
        for number, (start, stop) in enumerate(pairwise(edges)):
            rows = {keys[row]: row for row in np.unique(layout.rows[start:stop]).tolist()}
            tar = destination / f"shard-{number:06d}.tar"
            yield tar, handle, layout.files[start:stop], layout.spans[start:stop], rows

    return run_tasks(_write_one, arguments(), len(edges) - 1, report, "shards written")


def shard_edges(spans: Ints, shard_size: int, shard_bytes: int | None) -> list[int]:
    """Numbers of the samples at which shards begin, and of the end.

    Args:
        spans: (N, 3), as `read_spooled` takes them.
        shard_size: the most samples in a shard.
        shard_bytes: the most bytes of a tar.
    """
    total = len(spans)
    if shard_bytes is None:
        return [*range(0, total, shard_size), total]
    # a member fills whole blocks; the description in the spool is a little longer than the one in the shard
    bytes_N = HEADERS + ((spans[:, 1:] + 511) // 512 * 512).sum(axis=1)
    ends_N = np.cumsum(bytes_N)
    edges = [0]
    while edges[-1] < total:
        start = edges[-1]
        before = ends_N[start] - bytes_N[start]
        stop = int(np.searchsorted(ends_N, before + shard_bytes - TAR_END, side="right"))
        edges.append(min(max(stop, start + 1), start + shard_size, total))
    return edges


def _write_one(
    tar: Path, paths: list[Path], files: npt.NDArray[np.int32], spans: Ints, rows: dict[str, int]
) -> tuple[ShardEntry, Records]:
    """Write one shard, unless a pack that was killed finished it, and describe it and its samples."""
    if not (tar.exists() and index_path(tar).exists()):
        write_shard(tar, read_spooled(paths, files.tolist(), spans.tolist()), rows)
    return describe_shard(tar)
