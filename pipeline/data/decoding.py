"""Bytes to batches of images: DALI decodes and applies what was drawn. The product imports DALI here alone."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from PIL import Image
from torch import Tensor

from pipeline.data.headers import too_large
from pipeline.data.parsing import PARSING
from pipeline.data.preprocess import AugmentConfig, Draws, PreprocessConfig, noise_bank
from pipeline.data.reading import Work

_dali: Any = dali  # its type stubs lack most of what is used here
fn, types = _dali.fn, _dali.types

LOWEST = 19  # priority
QUEUE = 2  # batches that DALI holds, decoded or being decoded
LEAST_BLUR = 1e-3  # pixels; every neighbour's weight underflows to 0, while DALI takes 0 as "not given"
DALI_ERRORS = (RuntimeError, ValueError, IndexError)


class NotDecodedError(Exception):
    """DALI gave up on a batch; with it the whole pipeline is dead."""

    def __init__(self, work: Work, words: str) -> None:
        super().__init__(words)
        self.work = work


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


class Decoder:
    """Runs batches of bytes through DALI, QUEUE of them ahead, and finishes them in torch.

    Args:
        preprocess: the fixed part.
        augment: the random part; a batch of work without draws needs one with everything off.
        seed: of the noise.
        batch_size: the largest batch.
        threads: of DALI.
        device: where images are decoded and left.
    """

    def __init__(
        self,
        preprocess: PreprocessConfig,
        augment: AugmentConfig,
        seed: int,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._preprocess, self._augment, self._device = preprocess, augment, device
        self._batch_size, self._threads = batch_size, threads
        pixels = preprocess.channels * preprocess.size**2
        self._bank: Tensor | None = None
        if augment.noise > 0:
            bank = torch.from_numpy(noise_bank(seed, pixels)).to(device)
            self._bank = bank.unfold(0, pixels, 1)  # a view: row i is the noise that begins at place i
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Tensor]]:
        """Decode batch after batch, in order; the next is on its way when one is handed out.

        Raises:
            NotDecodedError: a batch failed; it holds the work.
        """
        works = iter(works)
        waiting = deque(islice(works, QUEUE))
        if not waiting:
            return
        gpu = self._device.type == "cuda"
        with PARSING:
            pipe = _graph(
                self._preprocess,
                self._augment,
                "mixed" if gpu else "cpu",
                batch_size=self._batch_size,
                num_threads=self._threads,
                device_id=(self._device.index or 0) if gpu else None,
                prefetch_queue_depth=len(waiting),
            )
        pipe.build()
        if not gpu:
            _give_way()
        for work in waiting:
            self._feed(pipe, work)
        pipe.schedule_run()  # DALI's first run takes as many batches as its queue is deep
        while waiting:
            try:
                (outputs,) = pipe.share_outputs()
            except DALI_ERRORS as error:
                raise NotDecodedError(waiting[0], str(error)) from error
            work = waiting.popleft()
            images_BCHW = self._finish(torch.utils.dlpack.from_dlpack(outputs.as_tensor()), work.draws)
            pipe.release_outputs()
            for following in islice(works, 1):
                waiting.append(following)
                self._feed(pipe, following)
                pipe.schedule_run()
            yield work, images_BCHW

    def _feed(self, pipe: Any, work: Work) -> None:
        """Hand a batch and its draws to DALI.

        It makes room for what a header claims. So an image that claims too much is kept from it: DALI fails on the byte
        in its place when the batch has its turn, and the image is found as any other that does not decode.
        """
        raws = [raw if too_large(raw) is None else b"\0" for raw in work.raws]
        # of arrays DALI would inspect each in Python, twice; tensors of its own it takes as they are
        tensors = [_dali.tensors.TensorCPU(np.frombuffer(raw, np.uint8)) for raw in raws]
        pipe.feed_input("raw", _dali.tensors.TensorListCPU(tensors))
        for name in _inputs(self._augment, self._preprocess.channels):
            assert work.draws is not None, "an augmented batch comes with its draws"
            pipe.feed_input(name, _drawn(name, work.draws))

    def _finish(self, images_BHWC: Tensor, draws: Draws | None) -> Tensor:
        """Add the noise and normalise; what is returned shares no memory with DALI's buffers."""
        if self._stream is None:
            return self._normalised(images_BHWC, draws)
        # DALI takes its buffers back after this. On a stream of our own we wait for these few kernels alone,
        # not for the trainer's.
        with torch.cuda.stream(self._stream):
            images_BCHW = self._normalised(images_BHWC, draws)
        self._stream.synchronize()
        images_BCHW.record_stream(torch.cuda.current_stream(self._device))
        return images_BCHW

    def _normalised(self, images_BHWC: Tensor, draws: Draws | None) -> Tensor:
        """(B, C, H, W) float32 in channels-last memory, which is how they come and what convolutions like.

        Here and not in DALI, whose operator takes five times as long on a CPU (docs/data.md).
        """
        pixels_BHWC = images_BHWC.to(torch.float32, copy=True)
        if self._bank is not None:
            assert draws is not None, "an augmented batch comes with its draws"
            noise_BP = self._bank[torch.from_numpy(draws.noise_starts_B).to(self._device)]
            sigma_B = torch.from_numpy(draws.noise_B).to(self._device)
            pixels_BHWC.addcmul_(noise_BP.view(pixels_BHWC.shape), sigma_B[:, None, None, None]).clamp_(0, 255)
        pixels_BHWC.sub_(self._preprocess.mean).mul_(1 / self._preprocess.std)
        return pixels_BHWC.permute(0, 3, 1, 2)


def _give_way() -> None:
    """Have DALI's threads of this process decode in the gaps that training leaves: they are ahead of it anyway."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that has just ended
            if (thread / "comm").read_text().startswith("[DALI]"):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), LOWEST)


@_dali.pipeline_def(enable_conditionals=True, exec_dynamic=True)  # type: ignore[untyped-decorator]
def _graph(preprocess: PreprocessConfig, augment: AugmentConfig, decode_on: str) -> Any:
    """DALI's part: bytes to (size, size, channels) images of 0 to 255, uint8 as far as nothing blends pixels."""
    raw = fn.external_source(name="raw", no_copy=True, ndim=1, dtype=types.UINT8)
    images = fn.decoders.image(raw, device=decode_on, output_type=types.GRAY if preprocess.channels == 1 else types.RGB)
    whole, square = [preprocess.resize] * 2, [preprocess.size] * 2
    if augment.crops:
        part = fn.external_source(name="crop", ndim=1, dtype=types.FLOAT)
        images = fn.resize(images, size=whole, roi_start=part[:2], roi_end=part[2:], roi_relative=True)
    else:
        shape = fn.peek_image_shape(raw)  # of the right size already: left alone
        if shape[0] != preprocess.resize or shape[1] != preprocess.resize:
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


def _inputs(augment: AugmentConfig, channels: int) -> list[str]:
    """Names of the draws that the graph takes."""
    compress = augment.compress > 0
    taken = {
        "crop": augment.crops,
        "colours": augment.twists(channels),
        "quality": compress,
        "compressed": compress,
        "matrix": augment.warps,
        "sigma": augment.blur > 0,
        "mirror": augment.flip and not augment.warps,
    }
    return [name for name, is_taken in taken.items() if is_taken]


def _drawn(name: str, draws: Draws) -> Any:
    """What is fed under a name."""
    return {
        "crop": draws.crops_B4,
        "colours": draws.colours_B4,
        "quality": draws.quality_B,
        "compressed": draws.compressed_B,
        "matrix": draws.matrices_B23,
        "sigma": np.maximum(draws.blur_B, np.float32(LEAST_BLUR)),
        "mirror": draws.mirrored_B,
    }[name]


@_dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
def _single() -> Any:
    """Decode one sample, to find out whether it can be."""
    return fn.decoders.image(fn.external_source(name="raw", ndim=1, dtype=types.UINT8), device="cpu")
