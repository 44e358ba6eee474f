"""Batches of images: the order's samples, read from shards, decoded and augmented by DALI.

The order, the reading and the random numbers are ours; DALI decodes and applies them, ahead of the trainer. So a
batch is a pure function of (data set, seed, step), and a rank's part of it does not depend on the others.
This is the only file that imports DALI.
"""

from __future__ import annotations

import io
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from PIL import Image
from torch import Tensor

from pipeline.data.balanced import order_of
from pipeline.data.manifest import Manifest
from pipeline.data.order import Ints, OrderConfig, batch_positions
from pipeline.data.preprocess import AugmentConfig, Draws, PreprocessConfig, draw_parameters, noise_bank
from pipeline.data.reading import ShardReader, UndecodableError, Work, pillow_refuses
from pipeline.errors import DataError
from pipeline.identities import IdentityTable

_dali: Any = dali  # its type stubs lack most of what is used here
fn, types = _dali.fn, _dali.types

QUEUE = 2  # batches that DALI holds, decoded or being decoded
READ_AHEAD = 2  # batches read before DALI asks for them
LEAST_BLUR = 1e-3  # pixels; every neighbour's weight underflows to 0, while DALI takes 0 as "not given"
DALI_ERRORS = (RuntimeError, ValueError, IndexError)
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images_BCHW: (B, channels, size, size) float32, normalised, on the loader's device.
        labels_B: (B,) int64 rows of the run's identity table, on the same device.
        step: number of the global batch, from 0.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    step: int


@_dali.pipeline_def(enable_conditionals=True, exec_dynamic=True)  # type: ignore[untyped-decorator]
def _graph(preprocess: PreprocessConfig, augment: AugmentConfig, decode_on: str) -> Any:
    """DALI's part: bytes to (size, size, channels) float32 images of 0 to 255."""
    raw = fn.external_source(name="raw", no_copy=True, ndim=1, dtype=types.UINT8)
    resized = fn.external_source(name="resized", ndim=0, dtype=types.BOOL)
    images = fn.decoders.image(raw, device=decode_on, output_type=types.GRAY if preprocess.channels == 1 else types.RGB)
    if resized:
        images = fn.resize(images, size=[preprocess.resize, preprocess.resize])
    square = [preprocess.size, preprocess.size]
    if augment.warps:
        matrix = fn.external_source(name="matrix", ndim=2, dtype=types.FLOAT)
        images = fn.warp_affine(images, matrix=matrix, size=square, dtype=types.FLOAT)
    else:
        images = fn.slice(images, start=[preprocess.margin] * 2, shape=square, axes=[0, 1], dtype=types.FLOAT)
    if augment.blur > 0:
        sigma = fn.external_source(name="sigma", ndim=0, dtype=types.FLOAT)
        images = fn.gaussian_blur(images, sigma=sigma, dtype=types.FLOAT)
    return images


@_dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
def _single() -> Any:
    """Decode one sample, to find out whether it can be."""
    return fn.decoders.image(fn.external_source(name="raw", ndim=1, dtype=types.UINT8), device="cpu")


def _dali_refuses(raw: bytes) -> str | None:
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


class _Decoder:
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
        # width and height as they stand in a PNG's header
        self._right_size = struct.pack(">II", preprocess.resize, preprocess.resize)
        self._pixels = preprocess.channels * preprocess.size**2
        self._bank: Tensor | None = None
        if augment.noise > 0:
            bank = torch.from_numpy(noise_bank(seed, self._pixels)).to(device)
            self._bank = bank.unfold(0, self._pixels, 1)  # a view: row i is the noise that begins at place i
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Tensor]]:
        """Decode batch after batch, in order; the next is on its way when one is handed out.

        Raises:
            _NotDecodedError: a batch failed; it holds the work.
        """
        works = iter(works)
        waiting = deque(islice(works, QUEUE))
        if not waiting:
            return
        gpu = self._device.type == "cuda"
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
        for work in waiting:
            self._feed(pipe, work)
        pipe.schedule_run()  # DALI's first run takes as many batches as its queue is deep
        while waiting:
            try:
                (outputs,) = pipe.share_outputs()
            except DALI_ERRORS as error:
                raise _NotDecodedError(waiting[0], str(error)) from error
            work = waiting.popleft()
            images_BCHW = self._finish(torch.utils.dlpack.from_dlpack(outputs.as_tensor()), work.draws)
            pipe.release_outputs()
            for following in islice(works, 1):
                waiting.append(following)
                self._feed(pipe, following)
                pipe.schedule_run()
            yield work, images_BCHW

    def _feed(self, pipe: Any, work: Work) -> None:
        """Hand a batch to DALI; an image is resized unless its header says that it has the right size."""
        # of arrays DALI would inspect each in Python, twice; tensors of its own it takes as they are
        tensors = [_dali.tensors.TensorCPU(np.frombuffer(raw, np.uint8)) for raw in work.raws]
        pipe.feed_input("raw", _dali.tensors.TensorListCPU(tensors))
        right = [raw.startswith(PNG_START) and raw[16:24] == self._right_size for raw in work.raws]
        pipe.feed_input("resized", ~np.array(right))
        if self._augment.warps:
            assert work.draws is not None, "an augmented batch comes with its draws"
            pipe.feed_input("matrix", work.draws.matrices_B23)
        if self._augment.blur > 0:
            assert work.draws is not None, "an augmented batch comes with its draws"
            pipe.feed_input("sigma", np.maximum(work.draws.blur_B, np.float32(LEAST_BLUR)))

    def _finish(self, images_BHWC: Tensor, draws: Draws | None) -> Tensor:
        """Add the noise and normalise; what is returned shares no memory with DALI's buffers."""
        if self._stream is None:
            return self._normalise(images_BHWC, draws)
        # DALI takes its buffers back after this. On a stream of our own we wait for these few kernels alone,
        # not for the trainer's.
        with torch.cuda.stream(self._stream):
            images_BCHW = self._normalise(images_BHWC, draws)
        self._stream.synchronize()
        images_BCHW.record_stream(torch.cuda.current_stream(self._device))
        return images_BCHW

    def _normalise(self, images_BHWC: Tensor, draws: Draws | None) -> Tensor:
        """(B, H, W, C) of 0 to 255 to normalised (B, C, H, W), with noise before, clipped to 0 to 255."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        if self._bank is not None:
            assert draws is not None, "an augmented batch comes with its draws"
            noise_BP = self._bank[torch.from_numpy(draws.noise_starts_B).to(self._device)]
            sigma_B = torch.from_numpy(draws.noise_B).to(self._device)
            noise_BCHW = noise_BP.view(images_BCHW.shape)
            images_BCHW = torch.addcmul(images_BCHW, noise_BCHW, sigma_B[:, None, None, None]).clamp_(0, 255)
        shifted_BCHW = torch.sub(images_BCHW, self._preprocess.mean)
        return shifted_BCHW.div_(self._preprocess.std).contiguous()


class _NotDecodedError(Exception):
    """DALI gave up on a batch."""

    def __init__(self, work: Work, words: str) -> None:
        super().__init__(words)
        self.work = work


def _read_ahead(read: Callable[[int], Work], numbers: Iterable[int], pool: ThreadPoolExecutor) -> Iterator[Work]:
    """Call `read` for each number, in order, READ_AHEAD of them before they are asked for."""
    numbers = iter(numbers)
    ahead = deque(pool.submit(read, number) for number in islice(numbers, READ_AHEAD))
    while ahead:
        work = ahead.popleft().result()
        ahead.extend(pool.submit(read, number) for number in islice(numbers, 1))
        yield work


def _decoded(
    reader: ShardReader, decoder: _Decoder, read: Callable[[int], Work], numbers: Iterable[int]
) -> Iterator[tuple[Work, Tensor]]:
    """Read and decode batches, and close the reader at the end.

    Raises:
        DataError: a shard cannot be read.
        UndecodableError: a sample does not decode.
    """
    pool = ThreadPoolExecutor(1, "shard-reader")
    try:
        yield from decoder.run(_read_ahead(read, numbers, pool))
    except _NotDecodedError as failure:
        pool.shutdown(cancel_futures=True)  # the reader's files are this thread's again
        bad = reader.bad_samples(failure.work, pillow_refuses) or reader.bad_samples(failure.work, _dali_refuses)
        if bad:
            raise UndecodableError(bad, failure.work.step) from None
        words = "; ".join(line.strip() for line in str(failure).splitlines()[-2:])
        raise DataError(f"batch {failure.work.step} was refused by DALI, though each sample decodes: {words}") from None
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


class TrainingLoader:
    """One rank's batches, endlessly, from `start_step` on.

    Iterating again goes on where the last iteration stopped. The pixels of a sample depend on (data set, seed,
    position), never on the world size, on threads or on where a run was resumed.

    Args:
        folder: of the data set's shards.
        manifest: of the data set.
        identities: the run's table, which labels are rows of; other identities of the data set are left out.
        preprocess: the fixed part of what is done to an image.
        augment: the random part.
        seed: of the order and of the augmentation, at least 0.
        global_batch: samples of a step over all ranks.
        rank: this rank.
        world_size: ranks.
        order: how far the order mixes.
        threads: of the decoder.
        device: "cpu" or "cuda:N": where images are decoded, and left.
        start_step: the first batch's number.

    Raises:
        DataError: an identity is not in the data set, the data set is broken, or nothing is left to train on.
        ConfigError: there are more ranks than samples in a batch.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        identities: IdentityTable,
        preprocess: PreprocessConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        order: OrderConfig | None = None,
        threads: int = 1,
        device: str | torch.device = "cpu",
        start_step: int = 0,
    ) -> None:
        order, digest = order or OrderConfig(), manifest.digest
        self._device = torch.device(device)
        self._preprocess, self._augment, self._seed = preprocess, augment, seed
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        rank_batch = len(batch_positions(0, global_batch, rank, world_size))
        self._reader = ShardReader(folder, manifest, _labels(manifest, identities), limit=order.open_shards)
        self._order = order_of(self._reader.selection, order, digest, seed, global_batch)
        self._decoder = _Decoder(preprocess, augment, seed, rank_batch, threads, self._device)
        self._step = start_step
        self._iterating = False
        self.samples = self._order.samples
        self._made_of: dict[str, int | str] = {
            "manifest": digest,
            "identities": identities.digest,
            "global_batch": global_batch,
            "seed": seed,
            "order": order.rule,
        }

    @property
    def state(self) -> dict[str, int | str]:
        """What a checkpoint keeps: the number of the next batch, and what `resume_step` compares."""
        return {"step": self._step, **self._made_of}

    def __iter__(self) -> Iterator[Batch]:
        assert not self._iterating, "one iteration at a time: they would share the open shards; close the other first"
        self._iterating = True
        try:
            for work, images_BCHW in _decoded(self._reader, self._decoder, self._read, count(self._step)):
                self._step = work.step + 1
                yield Batch(images_BCHW, torch.from_numpy(work.labels_B).to(self._device), work.step)
        finally:
            self._iterating = False

    def _read(self, step: int) -> Work:
        """Read this rank's part of a global batch and draw its augmentation."""
        positions_B = batch_positions(step, self._global_batch, self._rank, self._world_size)
        self._reader.expect(self._order.shards_ahead(positions_B))
        work = self._reader.read(step, *self._order.samples_at(positions_B))
        return replace(work, draws=draw_parameters(self._augment, self._preprocess, self._seed, positions_B))


def _labels(manifest: Manifest, identities: IdentityTable) -> Ints:
    """(C_manifest,) row of each of the manifest's identities in the run's table, NO_ROW for those left out."""
    there = manifest.identities()
    missing = [key for key in identities.keys if key not in there.row_of_key]
    if missing:
        raise DataError(
            f"{len(missing)} identities of the run are not in the data set, such as {missing[0]!r}; "
            "choose the identities from the data set that is trained on"
        )
    return identities.rows_of(there.keys)


def iterate_images(
    folder: Path,
    manifest: Manifest,
    preprocess: PreprocessConfig,
    batch_size: int,
    threads: int = 1,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, int]]:
    """Decode every sample once, in the shards' order, without augmentation.

    Args:
        folder: of the data set's shards.
        manifest: of the data set.
        preprocess: what is done to an image.
        batch_size: samples at a time; the last batch may be shorter.
        threads: of the decoder.
        device: "cpu" or "cuda:N": where images are decoded, and left.

    Yields:
        (B, channels, size, size) float32 images, and the number of the first of them in the data set.

    Raises:
        DataError: a shard cannot be read, or a sample does not decode.
    """
    assert batch_size > 0, "a batch holds at least one sample"
    starts = np.cumsum([0, *(entry.samples for entry in manifest.shards)])
    total = int(starts[-1])
    reader = ShardReader(folder, manifest, np.arange(len(manifest.identities())), limit=2)

    def read(number: int) -> Work:
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, total))
        shards = np.searchsorted(starts, indices, side="right") - 1
        return reader.read(number, shards, indices - starts[shards])

    decoder = _Decoder(preprocess, AugmentConfig(), 0, batch_size, threads, torch.device(device))
    for work, images_BCHW in _decoded(reader, decoder, read, range(-(-total // batch_size))):
        yield images_BCHW, work.step * batch_size
