"""Bytes to batches of images: DALI decodes and applies what was drawn, ahead of whoever takes them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.data.dali_graph import DALI_ERRORS, feed, graph
from pipeline.data.giving_way import Gaps, Wait
from pipeline.data.kept_memory import KeptMemory
from pipeline.data.parsing import PARSING
from pipeline.data.preprocess import AugmentConfig, Draws, PreprocessConfig, noise_bank
from pipeline.data.reading import Work

log = logging.getLogger(__name__)

THREADS = "[DALI]"  # what the names of its threads begin with
QUEUE = 2  # batches that DALI holds, decoded or being decoded


class NotDecodedError(Exception):
    """DALI gave up on a batch; with it the whole pipeline is dead."""

    def __init__(self, work: Work, words: str) -> None:
        super().__init__(words)
        self.work = work


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
        self._shape = (preprocess.size, preprocess.size, preprocess.channels)
        pixels = math.prod(self._shape)
        self._bank: Tensor | None = None
        if augment.noise > 0:
            bank = torch.from_numpy(noise_bank(seed, pixels)).to(device)
            self._bank = bank.unfold(0, pixels, 1)  # a view: row i is the noise that begins at place i
        self._memory = KeptMemory((batch_size, *self._shape)) if device.type == "cpu" else None  # torch keeps a GPU's
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._gaps = Gaps(THREADS, used=device.type == "cpu")

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Tensor]]:
        """Decode batch after batch, in order; the next is on its way when one is handed out.

        Raises:
            NotDecodedError: a batch failed; it holds the work.
        """
        works = iter(works)
        waiting = deque(islice(works, QUEUE))
        while waiting:
            try:
                yield from self._run(waiting, works)
            except NotDecodedError:
                if len(waiting) == 1:
                    raise
                yield from self._run(deque([waiting.popleft()]), iter(()))  # it may have been a later one
            waiting.extend(islice(works, QUEUE - len(waiting)))

    def _run(self, waiting: deque[Work], works: Iterator[Work]) -> Iterator[tuple[Work, Tensor]]:
        """Decode by one pipeline, to the end or until its threads find no gaps.

        Raises:
            NotDecodedError: one of the batches `waiting` failed, not always the first.
        """
        self._gaps.before_threads()
        pipe = self._pipeline(len(waiting))
        for work in waiting:
            feed(pipe, work, self._preprocess, self._augment)
        pipe.schedule_run()  # DALI's first run takes as many batches as its queue is deep
        while waiting:
            try:
                with Wait() as wait:
                    (outputs,) = pipe.share_outputs()
            except DALI_ERRORS as error:
                raise NotDecodedError(waiting[0], str(error)) from error
            work = waiting.popleft()
            images_BCHW = self._finish(torch.utils.dlpack.from_dlpack(outputs.as_tensor()), work.draws)
            pipe.release_outputs()
            over = self._gaps.over(wait)
            for following in islice(works, 0 if over else 1):
                waiting.append(following)
                with suppress(*DALI_ERRORS):  # of a later batch: told when the next one is asked for
                    feed(pipe, following, self._preprocess, self._augment)
                    pipe.schedule_run()
            yield work, images_BCHW
            if over:
                log.info("other programs use all processors: decoding gives way to them no longer")
                return

    def _pipeline(self, depth: int) -> Any:
        """DALI, ready to be fed `depth` batches."""
        gpu = self._device.type == "cuda"
        with PARSING:
            pipe = graph(
                self._preprocess,
                self._augment,
                "mixed" if gpu else "cpu",
                batch_size=self._batch_size,
                num_threads=self._threads,
                device_id=(self._device.index or 0) if gpu else None,
                prefetch_queue_depth=depth,
                exec_dynamic=gpu,  # on CPUs it takes more of them: a fifth of the decoding of small images
            )
        pipe.build()
        return pipe

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

    def _new(self, samples: int) -> Tensor:
        """(samples, H, W, C) float32 of any content, on the decoder's device."""
        if self._memory is not None:
            return self._memory.tensor(samples)
        return torch.empty((samples, *self._shape), device=self._device)

    def _normalised(self, images_BHWC: Tensor, draws: Draws | None) -> Tensor:
        """(B, C, H, W) float32 in channels-last memory, which is how they come and what convolutions like.

        Here and not in DALI: the noise comes first, and on a CPU its operator takes as long (docs/data.md).
        """
        pixels_BHWC = self._new(len(images_BHWC)).copy_(images_BHWC)
        if self._bank is not None:
            assert draws is not None, "an augmented batch comes with its draws"
            noise_BP = self._bank[torch.from_numpy(draws.noise_starts_B).to(self._device)]
            sigma_B = torch.from_numpy(draws.noise_B).to(self._device)
            pixels_BHWC.addcmul_(noise_BP.view(pixels_BHWC.shape), sigma_B[:, None, None, None]).clamp_(0, 255)
        pixels_BHWC.sub_(self._preprocess.mean).mul_(1 / self._preprocess.std)
        return pixels_BHWC.permute(0, 3, 1, 2)
