"""Adopting: a manifest, indices, a catalogue and an identity table for WebDataset tars that stay as they are.

One Ray task a tar decodes every image once; what does not decode is a reject, which neither the index nor the
catalogue lists. Samples keep the order of the tars: what was not shuffled when they were made is not shuffled now.
An adopted tar's `.cls` is what others put there: a sample's row in the identity table stands in the catalogue alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline.data.catalogue import RECORD, Records
from pipeline.data.checking import RejectedError, check_image
from pipeline.data.finishing import PackedSet, choose_identities, count_rejects, finish, finished
from pipeline.data.manifest import FILE_NAME, Manifest, ShardEntry
from pipeline.data.shards import index_line, index_path, write_index
from pipeline.data.sources import Reject, WebDatasetSource
from pipeline.data.sources.webdataset import TarSample, read_tar
from pipeline.data.spool import (
    NOT_UTF8,
    REJECTS,
    ReadConfig,
    read_columns,
    rejects_path,
    samples_path,
    written_columns,
)
from pipeline.data.tasks import Progress, run_tasks, silent
from pipeline.errors import ConfigError, DataError
from pipeline.files import file_sha256, write_json
from pipeline.schema import digest_json

WORK = ".adopt"
STATE = "state.json"
FORMAT = 1  # raise it when what an older version noted cannot be used
NOTED = pa.schema(
    {
        "identity": pa.string(),
        "key": pa.string(),
        "offset": pa.int64(),
        "size": pa.uint32(),
        "width": pa.int32(),
        "height": pa.int32(),
        "line": pa.string(),  # of the index
    }
)


def adopt(
    source: WebDatasetSource, destination: Path, config: ReadConfig, progress: Progress | None = None
) -> Manifest:
    """Make a data set of the tars in `destination`, without touching them; one that is made is returned as it is.

    Ray must be initialised, and every node must see `destination` under the same path. An index that stands
    beside a tar is replaced by one of the accepted samples. If it is killed, run again, it goes on with the tars
    that are not done. The driver needs about 80 bytes of memory for each sample.

    Args:
        source: the tars.
        destination: the folder of the tars; they are neither copied nor linked.
        config: what is taken of them.
        progress: called with (done, of how many, what is done) as the work goes on.

    Raises:
        ConfigError: the tars are elsewhere.
        DataError: a tar is broken, no sample is left, or the destination holds another data set or cannot be
            written.
        ClusterError: Ray lost the tasks.
    """
    destination = destination.expanduser().resolve()
    if destination != source.root:
        raise ConfigError(
            f"tars are adopted where they are, but --out is {destination} and the tars lie in {source.root}; "
            "give that as --out, or pack them anew without --adopt"
        )
    report = progress or silent
    fingerprint, work = source.fingerprint(), destination / WORK
    try:
        if (destination / FILE_NAME).exists():
            manifest = finished(destination, fingerprint, config)
        else:
            _prepare(work, digest_json([FORMAT, source.config.label_key, config.model_dump(mode="json")]))
            manifest = _adopt(source, fingerprint, work, config, report)
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(f"adopting {destination} failed: {error}; see to the disk, then adopt again") from None
    return manifest


def _adopt(source: WebDatasetSource, fingerprint: str, work: Path, config: ReadConfig, report: Progress) -> Manifest:
    handle, tars = ray.put(source), source.parts()
    run_tasks(note_tar, ((handle, tar, work / tar, config) for tar in tars), len(tars), report, "tars read and decoded")
    notes = [work / tar for tar in tars]
    samples = read_columns(map(samples_path, notes), NOTED)
    table, rows, few = choose_identities(samples["identity"], max(config.min_images, source.min_images))
    dropped = samples.select(["key", "identity"]).take(np.flatnonzero(rows < 0))
    dropped = dropped.append_column("reason", pa.array([few] * len(dropped), pa.string()))
    rejects = pa.concat_tables([read_columns(map(rejects_path, notes), REJECTS), dropped])
    if table is None:
        reasons = ", ".join(f"{number} x {why}" for why, number in count_rejects(rejects).items())
        raise DataError(f"the tars in {source.root} have no sample that can be adopted ({reasons or 'none at all'})")

    def arguments() -> Iterator[tuple[Path, Path, npt.NDArray[np.int32]]]:
        start = 0
        for tar, note in zip(tars, notes, strict=True):
            stop = start + read_columns([samples_path(note)], NOTED).num_rows
            yield source.root / tar, note, rows[start:stop]
            start = stop

    described = run_tasks(_index_tar, arguments(), len(tars), report, "indices written")
    sizes = np.stack([samples[field].to_numpy()[rows >= 0] for field in ("width", "height")], axis=1)
    shards = [one for one in described if one is not None]
    return finish(source.root, PackedSet(source.name, fingerprint, table, shards, rejects, sizes), config)


def _prepare(work: Path, digest: str) -> None:
    """Keep what was noted with the same config."""
    state = work / STATE
    if not state.exists() or json.loads(state.read_bytes()) != digest:
        state.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    write_json(state, digest)


def _done_path(note: Path) -> Path:
    return note.with_name(f"{note.name}.json")


def note_tar(source: WebDatasetSource, part: str, note: Path, config: ReadConfig) -> None:
    """Decode every image of a tar, and note what is accepted and what is not; nothing if the tar was done."""
    tar, done = source.root / part, _done_path(note)
    status = tar.stat()
    as_it_is = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if done.exists() and as_it_is.items() <= json.loads(done.read_bytes()).items():
        return
    done.unlink(missing_ok=True)
    with (
        written_columns(samples_path(note), NOTED) as samples,
        written_columns(rejects_path(note), REJECTS) as rejects,
        tar.open("rb") as stream,
    ):
        for found in read_tar(tar):
            row = _note(source, part, found, stream.fileno(), config)
            if isinstance(row, Reject):
                rejects.reject(row)
            else:
                samples.add(*row)
    write_json(done, {**as_it_is, "sha256": file_sha256(tar)})


def _note(
    source: WebDatasetSource, part: str, found: TarSample, file: int, config: ReadConfig
) -> tuple[Any, ...] | Reject:
    """One sample's row of NOTED, or why it is not accepted."""
    key, taken = f"{part}/{found.key}", source.take(found, file)
    if isinstance(taken, str):
        return Reject(key, "", taken)
    image, identity = taken[0], config.identity(taken[1])
    line = index_line(found.components)
    if not all(_is_utf8(text) for text in (line, identity)):
        return Reject(key, identity, NOT_UTF8)
    try:
        checked = check_image(os.pread(file, image.size, image.offset), config)
    except RejectedError as error:
        return Reject(key, identity, str(error))
    return identity, key, image.offset, image.size, checked.width, checked.height, line


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _index_tar(tar: Path, note: Path, rows: npt.NDArray[np.int32]) -> tuple[ShardEntry, Records] | None:
    """Write the index of the samples that have a row, and describe the tar and them; None if there is none."""
    kept = np.flatnonzero(rows >= 0)
    if not len(kept):
        index_path(tar).unlink(missing_ok=True)
        return None
    samples = read_columns([samples_path(note)], NOTED).take(kept)
    write_index(tar, samples["line"].to_pylist())
    records = np.empty(len(kept), RECORD)
    records["offset"], records["size"], records["row"] = samples["offset"], samples["size"], rows[kept]
    done: dict[str, Any] = json.loads(_done_path(note).read_bytes())
    entry = ShardEntry(
        name=tar.name,
        samples=len(kept),
        bytes=done["bytes"],
        tar_sha256=done["sha256"],
        index_sha256=file_sha256(index_path(tar)),
    )
    return entry, records
