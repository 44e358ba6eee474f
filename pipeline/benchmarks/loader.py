"""Images a second and processor time an image: our loader beside DALI alone, DALI's reader, WebDataset with Pillow."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from pydantic import Field

from pipeline.benchmarks.loader_rivals import dali_decode, dali_graph, dali_reader, webdataset_pil
from pipeline.benchmarks.measure import machine
from pipeline.data.finishing import write_data_set
from pipeline.data.loader import TrainingLoader
from pipeline.data.manifest import Manifest
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.sources import Sample
from pipeline.identities import IdentityTable
from pipeline.schema import Config

FLIP = AugmentConfig(flip=True)
FULL = AugmentConfig(
    flip=True, crop=0.5, crop_ratio=1.33, brightness=0.3, contrast=0.3, saturation=0.3, hue=10.0, grey=0.1,
    compress=0.3, blur=1.0,
)  # fmt: skip
IDENTITIES_COUNT = 64
WARM_UP = 20  # batches: buffers have grown, queues are full


class LoaderBenchmark(Config):
    """What is measured."""

    images: int = Field(4096, ge=1, description="JPEG images that are made for it")
    shard_size: int = Field(1024, ge=1, description="images in a shard")
    size: int = Field(112, ge=8, description="side of the images, pixels")
    quality: int = Field(90, ge=1, le=95, description="of their JPEG")
    augment: Literal["flip", "full"] = Field("flip", description="flip: and normalise; full: every augmentation")
    batch: int = Field(128, ge=1, description="images in a batch")
    threads: int = Field(2, ge=1, description="decoding threads, and processes of WebDataset's DataLoader")
    batches: int = Field(120, ge=1, description="batches that are timed in a round")
    repeats: int = Field(5, ge=1, description="rounds; medians are told")


def measure_loader(config: LoaderBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file."""
    torch.set_num_threads(1)
    augment = FLIP if config.augment == "flip" else FULL
    preprocess = PreprocessConfig(size=config.size, resize=config.size, channels=3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("making images")
        images = list(make_images(config))
        manifest = pack_images(folder, images, config.shard_size)
        tars = [folder / entry.name for entry in manifest.shards]
        ways: dict[str, Callable[[], Iterator[object]]] = {
            "pipeline": lambda: iter(_ours(folder, manifest, preprocess, augment, config)),
            "dali_decode": lambda: dali_decode(images, config.batch, config.threads),
            "dali_graph": lambda: dali_graph(images, preprocess, config.batch, config.threads),
            "dali_reader": lambda: dali_reader(tars, preprocess, augment, config.batch, config.threads),
            "webdataset_pil": lambda: webdataset_pil(tars, preprocess, augment, config.batch, config.threads),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        costs: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(config.repeats):
            for way, begin in ways.items():  # side by side: what disturbs one disturbs the other
                progress(f"round {number + 1} of {config.repeats}: {way}")
                speed, cost = _round(begin(), config)
                speeds[way].append(speed)
                costs[way].append(cost)
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    return {
        "benchmark": "loader",
        **config.model_dump(),
        "machine": machine(torch.device("cpu")),
        "images_per_s": medians,
        "images_per_s_all": speeds,
        "cpu_ms_per_image": {way: 1e3 * statistics.median(values) for way, values in costs.items()},
        "ratio_decode": _paired(speeds, "dali_decode"),
        "ratio_graph": _paired(speeds, "dali_graph"),
        "ratio_reader": _paired(speeds, "dali_reader"),
        "ratio_pil": _paired(speeds, "webdataset_pil"),
    }


def _paired(speeds: dict[str, list[float]], rival: str) -> float:
    """Our speed over a rival's: median over the rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(speeds["pipeline"], speeds[rival], strict=True))


def _round(batches: Iterator[object], config: LoaderBenchmark) -> tuple[float, float]:
    """Images a second, and processor seconds an image of this process and its children."""
    for _ in range(WARM_UP):
        next(batches)
    before, began = _cpu_seconds(), time.perf_counter()
    for _ in range(config.batches):
        next(batches)
    seconds, used = time.perf_counter() - began, _cpu_seconds() - before
    if hasattr(batches, "close"):
        batches.close()
    images = config.batches * config.batch
    return images / seconds, used / images


def _cpu_seconds() -> float:
    """Of this process and its living children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _ours(
    folder: Path, manifest: Manifest, preprocess: PreprocessConfig, augment: AugmentConfig, config: LoaderBenchmark
) -> TrainingLoader:
    return TrainingLoader(
        folder,
        manifest,
        manifest.identities(),
        preprocess,
        augment,
        seed=0,
        global_batch=config.batch,
        threads=config.threads,
    )


def make_images(config: LoaderBenchmark) -> Iterator[bytes]:
    """Pictures with large and small detail, about as hard to decode as photographs of faces."""
    rng = np.random.default_rng(0)
    for _ in range(config.images):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((config.size, config.size), Image.Resampling.BICUBIC), np.int16)
        picture = picture + rng.integers(-12, 13, picture.shape, dtype=np.int16)
        stream = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=config.quality)
        yield stream.getvalue()


def pack_images(folder: Path, images: list[bytes], shard_size: int) -> Manifest:
    """Shards, catalogue and manifest, without Ray."""
    table = IdentityTable.from_keys(f"id-{number:03d}" for number in range(IDENTITIES_COUNT))
    samples = [Sample(f"s{n:08d}", raw, "jpg", table.keys[n % len(table)]) for n, raw in enumerate(images)]
    parts = (samples[first : first + shard_size] for first in range(0, len(samples), shard_size))
    return write_data_set(folder, "benchmark", table, parts)
