"""How long the read path takes to its first batch, and how much memory: a catalogue of any size, without images.

python -m pipeline.benchmarks.startup FOLDER --samples 10000000 --shards 10000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.balanced import order_of
from pipeline.data.catalogue import FILE_NAME, RECORD, Records, save_catalogue
from pipeline.data.manifest import Manifest, ShardEntry
from pipeline.data.order import BalancedConfig, OrderConfig, batch_positions
from pipeline.data.reading import ShardReader
from pipeline.files import file_sha256
from pipeline.identities import NO_ROW

GLOBAL_BATCH = 1024
BALANCED = BalancedConfig(identities=256, images=4)
IMAGE_BYTES = 10_000
MIB = 1 << 20


def write_synthetic(folder: Path, samples: int, shards: int, identities: int) -> None:
    """Write the manifest and the catalogue of a data set that has neither images nor identities' keys."""
    assert samples % shards == 0, "as many samples in each shard"
    each = samples // shards
    rng = np.random.default_rng(0)

    def records() -> Iterator[Records]:
        for _ in range(shards):
            of_shard = np.empty(each, RECORD)
            of_shard["offset"], of_shard["size"] = np.arange(1, each + 1) * (IMAGE_BYTES + 2048), IMAGE_BYTES
            of_shard["row"] = rng.integers(identities, size=each)
            yield of_shard

    folder.mkdir(parents=True, exist_ok=True)
    save_catalogue(folder, records())
    digest = "0" * 64
    Manifest(
        folder=folder,
        name="synthetic",
        source=digest,
        pack={},
        samples=samples,
        identities_digest=digest,
        identities_count=identities,
        catalogue_sha256=file_sha256(folder / FILE_NAME),
        rejects={},
        shards=tuple(
            ShardEntry(
                name=f"shard-{number:06d}.tar",
                samples=each,
                bytes=(each + 1) * (IMAGE_BYTES + 2048),
                tar_sha256=digest,
                index_sha256=digest,
            )
            for number in range(shards)
        ),
    ).save()


def start(folder: Path, share: float, config: OrderConfig) -> dict[str, float]:
    """Start the read path in this process, up to the places of the first batch's samples.

    Args:
        folder: of the data set.
        share: of the identities that takes part.
        config: which order.

    Returns:
        Seconds of each stage, and this process's peak of resident MiB at the end of each.
    """
    told = {"imports_mib": _peak_mib()}
    began = time.perf_counter()
    manifest = Manifest.load(folder)
    digest = manifest.digest
    told |= {"manifest_s": time.perf_counter() - began, "manifest_mib": _peak_mib()}
    began = time.perf_counter()
    labels = np.arange(manifest.identities_count)
    labels[int(share * len(labels)) :] = NO_ROW
    reader = ShardReader(folder, manifest, labels, config.open_shards)
    order = order_of(reader.selection, config, digest, 0, GLOBAL_BATCH)
    positions_B = batch_positions(0, GLOBAL_BATCH)
    reader.expect(order.shards_ahead(positions_B))
    reader.selection.records_at(*order.samples_at(positions_B))
    told |= {"order_s": time.perf_counter() - began, "order_mib": _peak_mib()}
    began = time.perf_counter()
    for step in range(1, 11):
        order.samples_at(batch_positions(step, GLOBAL_BATCH))
    return told | {"next_batch_s": (time.perf_counter() - began) / 10}


def measure_startup(folder: Path, share: float = 1.0, balanced: bool = False) -> dict[str, float]:
    """What `start` tells of a process of its own, whose peak of memory is its own."""
    arguments = ["--share", str(share), *(["--balanced"] if balanced else [])]
    command = [sys.executable, "-m", "pipeline.benchmarks.startup", str(folder), "--start", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _peak_mib() -> float:
    """Peak of this process's resident memory; what the parent had before `exec` does not count, as in getrusage."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / MIB


def main() -> None:
    """Write the data set where it is missing, and print a line of JSON for each kind of start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--identities", type=int, default=1_000_000)
    parser.add_argument("--share", type=float, default=1.0, help="of the identities that takes part")
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--start", action="store_true", help="start once, in this process")
    given = parser.parse_args()
    if given.start:
        config = OrderConfig(balanced=BALANCED if given.balanced else None)
        print(json.dumps(start(given.folder, given.share, config)))
        return
    if not (given.folder / "manifest.json").exists():
        write_synthetic(given.folder, given.samples, given.shards, given.identities)
    for share, balanced in ((1.0, False), (0.5, False), (1.0, True), (0.5, True)):
        told = measure_startup(given.folder, share, balanced)
        print(json.dumps({"share": share, "balanced": balanced} | {key: round(told[key], 3) for key in told}))


if __name__ == "__main__":
    main()
