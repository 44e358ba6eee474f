"""A small data set made without Ray; its images are noise, which nobody decodes."""

from pathlib import Path

import numpy as np

from pipeline.data.catalogue import FILE_NAME as CATALOGUE
from pipeline.data.catalogue import records_of, save_catalogue
from pipeline.data.manifest import Manifest, ShardEntry
from pipeline.data.shards import ShardIndex, index_path, write_shard
from pipeline.data.sources import Sample
from pipeline.files import file_sha256
from pipeline.identities import IdentityTable

KEYS = tuple(f"id-{number}" for number in range(5))


def make_data_set(folder: Path, shards: int = 4, samples: int = 3, image_bytes: int = 5000) -> Manifest:
    """Write shards of about `samples * (image_bytes + 3000)` bytes, all of one size."""
    rng, table = np.random.default_rng(1), IdentityTable(KEYS)
    folder.mkdir(parents=True)
    entries = []
    for shard in range(shards):
        tar = folder / f"shard-{shard:06d}.tar"
        numbers = range(shard * samples, (shard + 1) * samples)
        write_shard(
            tar,
            (Sample(f"s{n:06d}", rng.bytes(image_bytes), "jpg", KEYS[n % 5], {}) for n in numbers),
            table.row_of_key,
        )
        entries.append(
            ShardEntry(
                name=tar.name,
                samples=samples,
                bytes=tar.stat().st_size,
                tar_sha256=file_sha256(tar),
                index_sha256=file_sha256(index_path(tar)),
            )
        )
    tars = [folder / entry.name for entry in entries]
    save_catalogue(folder, (records_of(ShardIndex.load(tar, index_path(tar), len(table))) for tar in tars))
    table.save(folder / "identities.parquet")
    manifest = Manifest(
        folder=folder,
        name="made by hand",
        source="0" * 64,
        pack={},
        samples=shards * samples,
        identities_digest=table.digest,
        identities_count=len(table),
        catalogue_sha256=file_sha256(folder / CATALOGUE),
        rejects={},
        shards=tuple(entries),
    )
    manifest.save()
    return manifest
