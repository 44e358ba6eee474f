"""Embedding parts in one process: read and decoded ahead, through the model in batches, into files."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.dali_graph import dali_refuses
from pipeline.data.decoding import Decoder, NotDecodedError
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.reading import Work, pillow_refuses
from pipeline.data.sources import Reject
from pipeline.embedding.output import Output, PartRecord
from pipeline.embedding.parts import Images, Parts
from pipeline.errors import DataError, GenerationError
from pipeline.vectors import Vectors

Float32 = npt.NDArray[np.float32]

READ_AHEAD = 2  # batches read before DALI asks for them
UNIT = 1e-3  # how far a vector's length may be from 1
BUFFER = re.compile(r" <\S+ object at 0x[0-9a-f]+>")  # in Pillow's words, where a file's name would be
NOWHERE = np.empty(0, np.int64)


class PartEmbedder:
    """Embeds parts with one model; threads may embed different parts at once, and take turns with the model.

    Args:
        model: (B, channels, size, size) images to (B, D) features, in evaluation mode, on the device.
        preprocess: the model's own.
        parts: what is embedded.
        output: where vectors go; its header tells their stamp.
        batch: images at a time.
        limit: images of a part that may turn out not to decode.
        threads: of the decoder.
        device: where images are decoded and embedded.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: PreprocessConfig,
        parts: Parts,
        output: Output,
        *,
        batch: int,
        limit: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._model, self._parts, self._output = model, parts, output
        self._batch, self._limit = batch, limit
        self._decoder = Decoder(preprocess, AugmentConfig(), 0, batch, threads, device)
        self._turn = threading.Lock()

    def embed(self, number: int) -> PartRecord:
        """Embed a part and write its file.

        Raises:
            DataError: it cannot be read, or more than `limit` of its images do not decode.
            GenerationError: an image has no direction in the model's space.
        """
        stamp = self._output.header.stamp
        keys: list[str] = []
        identities: list[str] = []
        blocks = [np.empty((0, stamp.dim), np.float32)]
        rejects: list[Reject] = []
        with closing(self._decoded(number, rejects)) as decoded:
            for images, pixels_BCHW in decoded:
                blocks.append(self._vectors(images, pixels_BCHW))
                keys += images.keys
                identities += images.identities
        if len(set(keys)) != len(keys):
            raise DataError(f"part {self._parts.names[number]} of {self._parts.name} has two samples of one key")
        keys_N, identities_N = (pa.array(column, pa.large_string()) for column in (keys, identities))
        return self._output.write(number, Vectors(stamp, keys_N, identities_N, np.concatenate(blocks)), rejects)

    def _vectors(self, images: Images, pixels_BCHW: Tensor) -> Float32:
        """(B, D) float32 vectors of length 1, of decoded images."""
        with torch.inference_mode():
            with self._turn:
                features_BD = self._model(pixels_BCHW)
            vectors_BD: Float32 = F.normalize(features_BD.float(), dim=1).cpu().numpy()
        wrong_B = ~(np.abs(np.linalg.norm(vectors_BD, axis=1) - 1) < UNIT)  # NaN is wrong, too
        if wrong_B.any():
            stamp = self._output.header.stamp
            raise GenerationError(
                f"generation {stamp.generation!r} gives image {images.keys[int(wrong_B.argmax())]!r} "
                "a feature that is zero or no number, which has no direction: look at the image, or train again"
            )
        return vectors_BD

    def _decoded(self, number: int, rejects: list[Reject]) -> Generator[tuple[Images, Tensor], None, None]:
        """A part's images batch after batch; those that do not decode are left out and added to `rejects`."""
        with closing(self._parts.read(number, self._batch)) as batches, ThreadPoolExecutor(1, "part-reader") as pool:
            fresh = self._counted(_read_ahead(batches, pool), number, rejects)
            again: deque[Images] = deque()
            while True:
                given: deque[Images] = deque()  # to DALI, and not given back
                try:
                    for _, pixels_BCHW in self._decoder.run(_works(chain(_taken(again), fresh), given)):
                        yield given.popleft(), pixels_BCHW
                    return
                except NotDecodedError as failure:  # its pipeline is dead; the batch it died of is the first
                    sound, bad = _parted(given.popleft(), failure)
                    self._count(rejects, bad, number)
                    again.extendleft(reversed([sound, *given]))

    def _counted(self, batches: Iterator[Images], number: int, rejects: list[Reject]) -> Iterator[Images]:
        for images in batches:
            self._count(rejects, images.rejects, number)
            yield images

    def _count(self, rejects: list[Reject], more: Iterable[Reject], number: int) -> None:
        rejects += more
        if len(rejects) > self._limit:
            raise too_many(len(rejects), self._limit, self._parts.names[number], rejects[-1].key, rejects[-1].reason)


def too_many(count: int, limit: int, part: str, key: str, reason: str) -> DataError:
    """The error of more images without a vector than are allowed; the last one is named."""
    return DataError(
        f"{count} images have no vector, more than --limit {limit}; last: {key!r} of {part}: {reason}; "
        "mend the data or raise the limit"
    )


def _read_ahead(batches: Iterator[Images], pool: ThreadPoolExecutor) -> Iterator[Images]:
    """The same batches, READ_AHEAD of them read before they are asked for; the pool has one thread."""
    waiting = deque(pool.submit(next, batches, None) for _ in range(READ_AHEAD))
    while (images := waiting.popleft().result()) is not None:
        waiting.append(pool.submit(next, batches, None))
        yield images


def _taken(again: deque[Images]) -> Iterator[Images]:
    while again:
        yield again.popleft()


def _works(batches: Iterable[Images], given: deque[Images]) -> Iterator[Work]:
    """What the decoder takes, and a note of it in `given`."""
    for images in batches:
        if images.raws:
            given.append(images)
            yield Work(0, NOWHERE, NOWHERE, NOWHERE, images.raws)


def _parted(images: Images, failure: NotDecodedError) -> tuple[Images, list[Reject]]:
    """Those of a batch that decode, and the others.

    Raises:
        DataError: each of them decodes alone.
    """
    for refuses in (pillow_refuses, dali_refuses):
        reasons = [refuses(raw) for raw in images.raws]
        if any(reason is not None for reason in reasons):
            break
    else:
        words = "; ".join(line.strip() for line in str(failure).splitlines()[-2:])
        raise DataError(f"DALI refuses the batch of {images.keys[0]!r}, though each image decodes: {words}") from None
    named = list(zip(images.keys, images.identities, reasons, strict=True))
    bad = [Reject(key, identity, BUFFER.sub("", reason)) for key, identity, reason in named if reason is not None]
    good = [place for place, reason in enumerate(reasons) if reason is None]
    sound = replace(
        images,
        keys=tuple(images.keys[place] for place in good),
        identities=tuple(images.identities[place] for place in good),
        raws=[images.raws[place] for place in good],
    )
    return sound, bad
