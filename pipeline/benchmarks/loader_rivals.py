"""What the loader is measured against: DALI alone, DALI's own WebDataset reader, and WebDataset with Pillow."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from nvidia import dali
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.shards import index_path

_dali: Any = dali
fn, types = _dali.fn, _dali.types
# Without its dynamic executor DALI keeps its buffers, and is faster.
_pipeline_on_cpu = partial(_dali.pipeline_def, device_id=None, exec_dynamic=False)


def dali_decode(images: Sequence[bytes], batch: int, threads: int) -> Iterator[None]:
    """DALI's decoder on bytes that lie in memory, and nothing else: the ceiling."""

    @_pipeline_on_cpu(batch_size=batch, num_threads=threads)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        return fn.decoders.image(fn.external_source(name="raw", no_copy=True, ndim=1, dtype=types.UINT8), device="cpu")

    return _from_memory(graph, images, batch)


def dali_graph(images: Sequence[bytes], preprocess: PreprocessConfig, batch: int, threads: int) -> Iterator[None]:
    """As `dali_decode`, and mirrored and normalised in DALI: what a loader without any cost of its own would do."""

    @_pipeline_on_cpu(batch_size=batch, num_threads=threads)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        decoded = fn.decoders.image(
            fn.external_source(name="raw", no_copy=True, ndim=1, dtype=types.UINT8), device="cpu"
        )
        mean, std = [preprocess.mean] * 3, [preprocess.std] * 3
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(decoded, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT)

    return _from_memory(graph, images, batch)


def _from_memory(graph: Any, images: Sequence[bytes], batch: int) -> Iterator[None]:
    """Run a graph on bytes that lie in memory, two batches ahead; one turn a batch."""
    tensors = [_dali.tensors.TensorCPU(np.frombuffer(image, np.uint8)) for image in images]
    firsts = range(0, len(tensors) - batch + 1, batch)
    batches = cycle([_dali.tensors.TensorListCPU(tensors[first : first + batch]) for first in firsts])
    pipe = graph(prefetch_queue_depth=2)
    pipe.build()
    for _ in range(2):
        pipe.feed_input("raw", next(batches))
    pipe.schedule_run()
    while True:
        pipe.share_outputs()
        pipe.release_outputs()
        pipe.feed_input("raw", next(batches))
        pipe.schedule_run()
        yield


def dali_reader(
    tars: Sequence[Path], preprocess: PreprocessConfig, augment: AugmentConfig, batch: int, threads: int
) -> Iterator[None]:
    """DALI's WebDataset reader with its own shuffling and random numbers, and what the loader does to an image."""

    @_pipeline_on_cpu(batch_size=batch, num_threads=threads)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        raw, label = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(index_path(tar)) for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=4 * batch,
            dont_use_mmap=True,
        )
        images = fn.decoders.image(raw, device="cpu")
        if augment.crops:
            images = fn.random_resized_crop(images, size=[preprocess.size] * 2, random_area=[augment.crop, 1.0])
            images = fn.color_twist(
                images,
                brightness=fn.random.uniform(range=_around(augment.brightness)),
                contrast=fn.random.uniform(range=_around(augment.contrast)),
                saturation=fn.random.uniform(range=_around(augment.saturation)),
                hue=fn.random.uniform(range=(-augment.hue, augment.hue)),
            )
            images = fn.jpeg_compression_distortion(
                images, quality=fn.random.uniform(values=[30, 60, 95], dtype=types.INT32)
            )
            images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=(0.1, max(augment.blur, 0.2))))
        mirror = fn.random.coin_flip()
        mean, std = [preprocess.mean] * 3, [preprocess.std] * 3
        return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT), label

    pipe = graph(prefetch_queue_depth=2)
    pipe.build()
    while True:
        pipe.run()
        yield


def webdataset_pil(
    tars: Sequence[Path], preprocess: PreprocessConfig, augment: AugmentConfig, batch: int, processes: int
) -> Iterator[None]:
    """WebDataset's reader, Pillow, and torch's DataLoader: what most people have."""
    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
    dataset = dataset.repeat().shuffle(4 * batch).to_tuple("jpg", "cls").map(PillowPipeline(preprocess, augment))
    loader = webdataset.WebLoader(
        dataset.batched(batch, partial=False),
        batch_size=None,
        num_workers=processes,
        multiprocessing_context="forkserver",
    )
    for _ in loader:
        yield


class PillowPipeline:
    """Decode, augment and normalise one image with Pillow and NumPy."""

    def __init__(self, preprocess: PreprocessConfig, augment: AugmentConfig) -> None:
        self.preprocess, self.augment = preprocess, augment
        self.random = random.Random(0)

    def __call__(self, sample: tuple[bytes, bytes]) -> tuple[Tensor, int]:
        """(3, size, size) float32, and the label."""
        image = Image.open(io.BytesIO(sample[0])).convert("RGB")
        if self.augment.crops:
            image = self._augmented(image)
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
        pixels = (pixels - np.float32(self.preprocess.mean)) / np.float32(self.preprocess.std)
        return torch.from_numpy(np.ascontiguousarray(pixels)), int(sample[1])

    def _augmented(self, image: Image.Image) -> Image.Image:
        augment, size = self.augment, self.preprocess.size
        side = self.random.uniform(augment.crop, 1.0) ** 0.5 * image.width
        left, top = (self.random.uniform(0, image.width - side) for _ in range(2))
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        for enhance, change in (
            (ImageEnhance.Brightness, augment.brightness),
            (ImageEnhance.Contrast, augment.contrast),
            (ImageEnhance.Color, augment.saturation),
        ):
            image = enhance(image).enhance(self.random.uniform(*_around(change)))
        hue, saturation, value = image.convert("HSV").split()
        turn = int(self.random.uniform(-augment.hue, augment.hue) / 360 * 255)
        image = Image.merge(
            "HSV", (hue.point([(level + turn) % 256 for level in range(256)]), saturation, value)
        ).convert("RGB")
        if self.random.random() < augment.grey:
            image = image.convert("L").convert("RGB")
        if self.random.random() < augment.compress:
            stream = io.BytesIO()
            image.save(stream, "jpeg", quality=self.random.randint(augment.compress_quality, 95))
            image = Image.open(stream).convert("RGB")
        return image.filter(ImageFilter.GaussianBlur(self.random.uniform(0, augment.blur)))


def _around(change: float) -> tuple[float, float]:
    return 1 - change, 1 + change
