"""Images a second of embedding, from shards to files of vectors, beside the model's forward alone on decoded images."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.benchmarks.loader import LoaderBenchmark, make_images, pack_images
from pipeline.benchmarks.measure import machine, wait
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.preprocess import PreprocessConfig
from pipeline.data.store_remote import StoreConfig
from pipeline.embedding.actor import CALLS
from pipeline.embedding.output import Header, Output
from pipeline.embedding.parts import ShardParts
from pipeline.embedding.worker import PartEmbedder
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.schema import Config
from pipeline.stamp import Stamp
from pipeline.vectors import Dtype


class EmbedBenchmark(Config):
    """What is measured."""

    images: int = Field(1024, ge=1, description="JPEG images that are made for it")
    shard_size: int = Field(256, ge=1, description="images in a shard, and so vectors in a file")
    size: int = Field(112, ge=8, description="side of the images, pixels")
    grey: bool = Field(False, description="the model takes grey images")
    quality: int = Field(90, ge=1, le=95, description="of their JPEG")
    backbone: str = Field("iresnet18", description="the model, with fresh weights")
    dim: int = Field(512, ge=2, description="of the vectors")
    dtype: Dtype = Field("float32", description="of the values on disk")
    batch: int = Field(64, ge=1, description="images in a batch")
    threads: int = Field(os.cpu_count() or 1, ge=1, description="of the model, both ways, and as many that decode")
    gpu: bool = Field(False, description="on the GPU")
    repeats: int = Field(5, ge=1, description="rounds; medians are told")


def measure_embed(config: EmbedBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file.

    `ratio_forward` is the speed of embedding over that of the forward alone: the median over the rounds.

    Raises:
        ConfigError: the backbone is unknown.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if config.gpu else torch.device("cpu")
    channels: Literal[1, 3] = 1 if config.grey else 3
    preprocess = PreprocessConfig(size=config.size, resize=config.size, channels=channels)
    shape: dict[str, Any] = {"image_size": config.size, "channels": channels}
    model = build_backbone(BackboneConfig(name=config.backbone, embedding_dim=config.dim, **shape)).eval().to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("making images")
        made = LoaderBenchmark(images=config.images, size=config.size, quality=config.quality)
        manifest = pack_images(folder / "shards", list(make_images(made)), config.shard_size)
        ways: dict[str, Callable[[], object]] = {
            "pipeline": lambda: _embed(model, preprocess, manifest, config, device),
            "forward": lambda: _forward(model, decoded, device),
            "decode": lambda: _decode(manifest, preprocess, config, device),
        }
        decoded = _decode(manifest, preprocess, config, device)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for way, work in ways.items():
            progress(f"warming up: {way}")
            work()
        for number in range(config.repeats):
            for way, work in ways.items():  # side by side: what disturbs one disturbs the other
                progress(f"round {number + 1} of {config.repeats}: {way}")
                began = time.perf_counter()
                work()
                speeds[way].append(config.images / (time.perf_counter() - began))
    ratios = [ours / alone for ours, alone in zip(speeds["pipeline"], speeds["forward"], strict=True)]
    return {
        "benchmark": "embed",
        **config.model_dump(),
        "machine": machine(device),
        "images_per_s": {way: statistics.median(values) for way, values in speeds.items()},
        "images_per_s_all": speeds,
        "ratio_forward": statistics.median(ratios),
        "ratio_forward_all": ratios,
    }


def _embed(
    model: nn.Module, preprocess: PreprocessConfig, manifest: Manifest, config: EmbedBenchmark, device: torch.device
) -> None:
    """What an actor does, all of it: reading, decoding, the model, and the files."""
    parts = ShardParts(str(manifest.folder), StoreConfig())
    with tempfile.TemporaryDirectory(dir=manifest.folder.parent) as out:
        stamp = Stamp(family="benchmark", generation="fresh", digest="0", dim=config.dim, preprocess="0")
        output = Output(Path(out), Header.of(stamp, config.dtype, parts), parts.names)
        embedder = PartEmbedder(
            model, preprocess, parts, output, batch=config.batch, limit=0, threads=config.threads, device=device
        )
        with output.alone(), ThreadPoolExecutor(CALLS) as calls:
            records = dict(enumerate(calls.map(embedder.embed, range(len(parts.names)))))
            told = output.finish(records)
    assert told["rows"] == config.images, "every image has a vector"


def _forward(model: nn.Module, decoded: list[Tensor], device: torch.device) -> None:
    with torch.inference_mode():
        for images_BCHW in decoded:
            model(images_BCHW)
    wait(device)


def _decode(
    manifest: Manifest, preprocess: PreprocessConfig, config: EmbedBenchmark, device: torch.device
) -> list[Tensor]:
    """(B, channels, size, size) batches of all images, on the device."""
    batches = iterate_images(manifest.folder, manifest, preprocess, config.batch, config.threads, device)
    return [images_BCHW for images_BCHW, _ in batches]
