"""The end of packing and of adopting: identities, rejects, catalogue, summary, and the manifest last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.catalogue import Records, records_of, save_catalogue
from pipeline.data.manifest import IDENTITIES, Manifest, ShardEntry
from pipeline.data.shards import ShardIndex, index_path, write_shard
from pipeline.data.sources import Sample
from pipeline.data.spool import ReadConfig
from pipeline.data.summary import write_summary
from pipeline.errors import DataError
from pipeline.files import file_sha256, written_whole
from pipeline.identities import NO_ROW, IdentityTable

REJECTS_FILE = "rejects.jsonl"


@dataclass(frozen=True)
class PackedSet:
    """A data set whose shards stand, but whose manifest does not.

    Attributes:
        name: of the data set.
        fingerprint: of its source.
        table: its identities.
        shards: what the manifest says of each shard, and the records of its samples.
        rejects: columns key, identity and reason.
        sizes: (N, 2) int32; width and height of the samples, in any order that is always the same.
    """

    name: str
    fingerprint: str
    table: IdentityTable
    shards: list[tuple[ShardEntry, Records]]
    rejects: pa.Table
    sizes: npt.NDArray[np.int32]


def choose_identities(
    identities: pa.ChunkedArray, min_images: int
) -> tuple[IdentityTable | None, npt.NDArray[np.int32], str]:
    """The identities with enough images.

    Args:
        identities: (N,) key of each sample's identity.
        min_images: fewer images are not enough.

    Returns:
        The table (None if no identity is left), (N,) each sample's row in it or NO_ROW, and the reason for which
        the samples without a row are rejected.
    """
    chunks = [chunk for chunk in identities.dictionary_encode().chunks if len(chunk)]  # they share one dictionary
    names = chunks[-1].dictionary.to_pylist() if chunks else []
    codes = np.concatenate([np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in chunks)])
    assert all(len(chunk.dictionary) == len(names) for chunk in chunks), "codes of all chunks mean the same"
    enough = np.bincount(codes, minlength=len(names)) >= min_images
    kept = [name for name, chosen in zip(names, enough, strict=True) if chosen]
    reason = f"identity has fewer than {min_images} images"
    if not kept:
        return None, np.full(len(codes), NO_ROW, np.int32), reason
    table = IdentityTable.from_keys(kept)
    return table, table.rows_of(names).astype(np.int32)[codes], reason


def count_rejects(rejects: pa.Table) -> dict[str, int]:
    """Rejects by reason."""
    counts = pc.value_counts(rejects["reason"]).to_pylist()
    return dict(sorted((one["values"], one["counts"]) for one in counts))


def finished(destination: Path, fingerprint: str, config: ReadConfig) -> Manifest:
    """Return the data set that is there, if it is of this source and config and whole.

    Raises:
        DataError: it is not.
    """
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


def finish(destination: Path, packed: PackedSet, config: ReadConfig) -> Manifest:
    """Write all that stands beside the shards, and the manifest last."""
    manifest = describe(
        destination,
        packed.name,
        packed.table,
        packed.shards,
        source=packed.fingerprint,
        pack=config.model_dump(mode="json"),
        rejects=count_rejects(packed.rejects),
    )
    _write_rejects(destination / REJECTS_FILE, packed.rejects)
    write_summary(manifest, [records for _, records in packed.shards], packed.sizes)
    manifest.save()
    return manifest


def describe_shard(tar: Path) -> tuple[ShardEntry, Records]:
    """What the manifest says of a shard that `write_shard` wrote, and the records of its samples."""
    records = records_of(ShardIndex.load(tar, index_path(tar)))
    entry = ShardEntry(
        name=tar.name,
        samples=len(records),
        bytes=tar.stat().st_size,
        tar_sha256=file_sha256(tar),
        index_sha256=file_sha256(index_path(tar)),
    )
    return entry, records


def describe(
    folder: Path,
    name: str,
    table: IdentityTable,
    shards: Sequence[tuple[ShardEntry, Records]],
    *,
    source: str,
    pack: dict[str, Any],
    rejects: dict[str, int],
) -> Manifest:
    """Write catalogue and identity table of a folder of shards, and return its manifest, not yet written."""
    save_catalogue(folder, (records for _, records in shards))
    table.save(folder / IDENTITIES)
    return Manifest(
        folder=folder,
        name=name,
        source=source,
        pack=pack,
        samples=sum(entry.samples for entry, _ in shards),
        identities_digest=table.digest,
        identities_count=len(table),
        rejects=rejects,
        shards=tuple(entry for entry, _ in shards),
        catalogue_sha256=file_sha256(folder / CATALOGUE),
    )


def write_data_set(folder: Path, name: str, table: IdentityTable, shards: Iterable[Iterable[Sample]]) -> Manifest:
    """Write a small data set in this process, its images as they are: no Ray, no shuffle, no check.

    Args:
        folder: of the data set.
        name: of the data set.
        table: of the samples' identities.
        shards: the samples of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number, samples in enumerate(shards):
        tar = folder / f"shard-{number:06d}.tar"
        write_shard(tar, samples, table.row_of_key)
        described.append(describe_shard(tar))
    manifest = describe(folder, name, table, described, source="0" * 64, pack={}, rejects={})
    manifest.save()
    return manifest


def _write_rejects(path: Path, rejects: pa.Table) -> None:
    """One JSON object a line, ordered by key."""
    ordered = rejects.sort_by([(column, "ascending") for column in ("key", "identity", "reason")])
    with written_whole(path) as stream:
        for batch in ordered.to_batches(max_chunksize=4096):
            stream.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in batch.to_pylist())
