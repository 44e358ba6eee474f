"""DALI's part of a batch: from bytes to pixels, by what was drawn. The product imports DALI here alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia import dali
from PIL import Image

from pipeline.data.checking import PILLOW_LIMIT
from pipeline.data.headers import claimed_size
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.reading import Work

_dali: Any = dali  # its type stubs lack most of what is used here
fn, types = _dali.fn, _dali.types

LEAST_BLUR = 1e-3  # pixels; every neighbour's weight underflows to 0, while DALI takes 0 as "not given"
DALI_ERRORS = (RuntimeError, ValueError, IndexError)


def dali_refuses(raw: bytes) -> str | None:
    """Why DALI does not decode an image that Pillow does, None if it does."""
    pipe = _single()
    pipe.build()
    try:
        pipe.feed_input("raw", [np.frombuffer(raw, np.uint8)])
        pipe.run()
    except DALI_ERRORS:
        kind = Image.open(io.BytesIO(raw)).format
        return f"DALI does not decode this {kind} image; convert it to png, jpg or webp"
    return None


@_dali.pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def graph(preprocess: PreprocessConfig, augment: AugmentConfig, decode_on: str) -> Any:
    """DALI's part: bytes to (size, size, channels) images of 0 to 255, uint8 as far as nothing blends pixels."""
    raw = fn.external_source(name="raw", no_copy=True, ndim=1, dtype=types.UINT8)
    images = fn.decoders.image(raw, device=decode_on, output_type=types.GRAY if preprocess.channels == 1 else types.RGB)
    whole, square = [preprocess.resize] * 2, [preprocess.size] * 2
    if augment.crops:
        part = fn.external_source(name="crop", ndim=1, dtype=types.FLOAT)
        images = fn.resize(images, size=whole, roi_start=part[:2], roi_end=part[2:], roi_relative=True)
    else:
        misfits = fn.external_source(name="misfits", ndim=0, dtype=types.BOOL)
        if misfits:  # those of the right size already are left alone
            images = fn.resize(images, size=whole)
    if augment.twists(preprocess.channels):
        images = _twist(images, preprocess.channels)
    if augment.compress > 0:
        quality = fn.external_source(name="quality", ndim=0, dtype=types.INT32)
        compressed = fn.external_source(name="compressed", ndim=0, dtype=types.BOOL)
        if compressed:
            images = _compress(images, quality, preprocess.channels)
    if augment.warps:
        matrix = fn.external_source(name="matrix", ndim=2, dtype=types.FLOAT)
        images = fn.warp_affine(images, matrix=matrix, size=square, dtype=types.FLOAT)
    elif preprocess.size != preprocess.resize:
        images = fn.slice(images, start=[preprocess.margin] * 2, shape=square, axes=[0, 1])
    if augment.blur > 0:
        sigma = fn.external_source(name="sigma", ndim=0, dtype=types.FLOAT)
        images = fn.gaussian_blur(images, sigma=sigma, dtype=types.FLOAT)
    if augment.flip and not augment.warps:
        images = fn.flip(images, horizontal=fn.external_source(name="mirror", ndim=0, dtype=types.INT32))
    return images


def _twist(images: Any, channels: int) -> Any:
    """Brightness and contrast, and of colour images saturation and hue."""
    colours = fn.external_source(name="colours", ndim=1, dtype=types.FLOAT)
    if channels == 1:
        return fn.brightness_contrast(images, brightness=colours[0], contrast=colours[1])
    return fn.color_twist(images, brightness=colours[0], contrast=colours[1], saturation=colours[2], hue=colours[3])


def _compress(images: Any, quality: Any, channels: int) -> Any:
    """Through JPEG and back; DALI does so with colour images alone."""
    if channels == 3:
        return fn.jpeg_compression_distortion(images, quality=quality)
    colour = fn.color_space_conversion(images, image_type=types.GRAY, output_type=types.RGB)
    again = fn.jpeg_compression_distortion(colour, quality=quality)
    return fn.color_space_conversion(again, image_type=types.RGB, output_type=types.GRAY)


def feed(pipe: Any, work: Work, preprocess: PreprocessConfig, augment: AugmentConfig) -> None:
    """Hand a batch and its draws to a pipeline of `graph`.

    It makes room for what a header claims. So an image that claims too much is kept from it: DALI fails on the byte
    in its place when the batch has its turn, and the image is found as any other that does not decode.
    """
    sizes = [claimed_size(raw) for raw in work.raws]
    raws = [
        raw if width * height <= PILLOW_LIMIT else b"\0" for raw, (width, height) in zip(work.raws, sizes, strict=True)
    ]
    # of arrays DALI would inspect each in Python, twice; tensors of its own it takes as they are
    tensors = [_dali.tensors.TensorCPU(np.frombuffer(raw, np.uint8)) for raw in raws]
    pipe.feed_input("raw", _dali.tensors.TensorListCPU(tensors))
    for name, values in _inputs(work, sizes, preprocess, augment).items():
        pipe.feed_input(name, values)


def _inputs(
    work: Work, sizes: Sequence[tuple[int, int]], preprocess: PreprocessConfig, augment: AugmentConfig
) -> dict[str, Any]:
    """What the graph takes beside the bytes."""
    inputs: dict[str, Any] = {}
    if not augment.crops:
        fitting = (preprocess.resize, preprocess.resize)
        inputs["misfits"] = np.array([size != fitting for size in sizes])
    if (draws := work.draws) is None:
        return inputs
    if augment.crops:
        inputs["crop"] = draws.crops_B4
    if augment.twists(preprocess.channels):
        inputs["colours"] = draws.colours_B4
    if augment.compress > 0:
        inputs |= {"quality": draws.quality_B, "compressed": draws.compressed_B}
    if augment.warps:
        inputs["matrix"] = draws.matrices_B23
    if augment.blur > 0:
        inputs["sigma"] = np.maximum(draws.blur_B, np.float32(LEAST_BLUR))
    if augment.flip and not augment.warps:
        inputs["mirror"] = draws.mirrored_B
    return inputs


@_dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
def _single() -> Any:
    """Decode one sample, to find out whether it can be."""
    return fn.decoders.image(fn.external_source(name="raw", ndim=1, dtype=types.UINT8), device="cpu")
