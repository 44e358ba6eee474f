"""Batches of images: the order's samples, read from shards, decoded and augmented.

The order, the reading and the random numbers are ours; DALI decodes and applies them, ahead of the trainer. So a
batch is a pure function of (data set, seed, step), and a rank's part of it does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.balanced import order_of
from pipeline.data.dali_graph import dali_refuses
from pipeline.data.decoding import Decoder, NotDecodedError
from pipeline.data.manifest import Manifest
from pipeline.data.order import Ints, OrderConfig, batch_positions, resume_step
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig, draw_parameters
from pipeline.data.quarantine import Quarantine
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reading import ShardReader, UndecodableError, Work, pillow_refuses
from pipeline.data.store import ShardFiles
from pipeline.errors import DataError
from pipeline.identities import NO_ROW, IdentityTable

REPLACEMENT_STRIDE = 7919  # places in the epoch from a sample in quarantine to its replacement; a prime


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images_BCHW: (B, channels, size, size) float32, normalised, on the loader's device, channels last in memory.
        labels_B: (B,) int64 rows of the run's identity table, on the same device.
        step: number of the global batch, from 0.
        find_keys: names the samples, by another look at their shards.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    step: int
    find_keys: Callable[[], list[str]]

    def keys(self) -> list[str]:
        """Names of the samples in their shards, in the order of the images."""
        return self.find_keys()


def _decoded(
    reader: ShardReader,
    decoder: Decoder,
    ahead: ReadAhead,
) -> Iterator[tuple[Work, Tensor]]:
    """Decode batches that are read ahead, and close the reader at the end.

    Raises:
        DataError: a shard cannot be read, or not in time.
        UndecodableError: a sample does not decode.
    """
    try:
        yield from decoder.run(ahead)
    except NotDecodedError as failure:
        ahead.end()  # the reader's files are this thread's again
        bad = reader.bad_samples(failure.work, pillow_refuses) or reader.bad_samples(failure.work, dali_refuses)
        if bad:
            raise UndecodableError(bad, failure.work.step) from None
        words = "; ".join(line.strip() for line in str(failure).splitlines()[-2:])
        raise DataError(f"batch {failure.work.step} was refused by DALI, though each sample decodes: {words}") from None
    finally:
        if ahead.end():
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
        store: of the shards; None: they lie in `folder`.
        quarantine: takes the samples that do not decode; each is replaced by another one of its epoch, the same on
            any number of ranks. None: such a sample ends the run.
        patience_s: seconds that the shards of a batch are waited for; None: for ever.

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
        store: ShardFiles | None = None,
        quarantine: Quarantine | None = None,
        patience_s: float | None = None,
    ) -> None:
        order, digest = order or OrderConfig(), manifest.digest
        self._manifest, self._device = manifest, torch.device(device)
        self._preprocess, self._augment, self._seed = preprocess, augment, seed
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        rank_batch = len(batch_positions(0, global_batch, rank, world_size))
        self._open_reader = partial(ShardReader, folder, manifest, _labels(manifest, identities), store=store)
        self._reader = self._open_reader(order.open_shards)
        self._order = order_of(self._reader.selection, order, digest, seed, global_batch)
        self._decoder = Decoder(preprocess, augment, seed, rank_batch, threads, self._device)
        self._step, self._quarantine, self._patience_s = start_step, quarantine, patience_s
        self._iterating = False
        self._ahead: ReadAhead | None = None
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
        """What a checkpoint keeps: the number of the next batch, and what `load_state` compares."""
        return {"step": self._step, **self._made_of}

    @property
    def quarantined(self) -> int:
        """Samples that are known not to decode, as far as this rank knows."""
        return 0 if self._quarantine is None else len(self._quarantine)

    @property
    def queued(self) -> int:
        """Batches that are read and wait to be decoded: where there are none, the decoder waits for the shards."""
        return 0 if self._ahead is None else self._ahead.queued

    def load_state(self, stored: Mapping[str, object]) -> None:
        """Go on from where a loader of the same batches stood.

        Raises:
            DataError: its data set or identities were others.
            ConfigError: its global batch, seed or order was another.
        """
        assert not self._iterating, "a loader takes a state before it is iterated"
        self._step = resume_step(stored, self.state)

    def __iter__(self) -> Iterator[Batch]:
        assert not self._iterating, "one iteration at a time: they would share the open shards; close the other first"
        self._iterating = True
        try:
            while True:
                try:
                    numbers = count(self._step)
                    self._ahead = ReadAhead(self._read, numbers, self._patience_s, lambda: self._reader.at)
                    for work, images_BCHW in _decoded(self._reader, self._decoder, self._ahead):
                        self._step = work.step + 1
                        labels_B = torch.from_numpy(work.labels_B).to(self._device)
                        keys = partial(self._keys, work.shards_B, work.places_B)
                        yield Batch(images_BCHW, labels_B, work.step, keys)
                except UndecodableError as error:
                    if self._quarantine is None:
                        raise
                    self._quarantine.add(error.samples, error.step)  # and again from this step, with replacements
        finally:
            self._iterating = False

    def _keys(self, shards_B: Ints, places_B: Ints) -> list[str]:
        """Names of samples, by a reader of their own: the loader's is another thread's."""
        reader = self._open_reader(1)
        try:
            return reader.keys(shards_B, places_B)
        finally:
            reader.close()

    def _read(self, step: int) -> Work:
        """Read this rank's part of a global batch and draw its augmentation."""
        positions_B = batch_positions(step, self._global_batch, self._rank, self._world_size)
        self._reader.expect(self._order.shards_ahead(positions_B))
        work = self._reader.read(step, *self._sound_samples(positions_B))
        return replace(work, draws=draw_parameters(self._augment, self._preprocess, self._seed, positions_B))

    def _sound_samples(self, positions_B: Ints) -> tuple[Ints, Ints]:
        """Shards and places of the samples at `positions_B`, with others of the epoch for those in quarantine."""
        shards_B, places_B = self._order.samples_at(positions_B)
        quarantine = self._quarantine
        if quarantine is None or not len(quarantine):
            return shards_B, places_B
        for attempt in range(1, self.samples + 1):
            names = [self._manifest.shards[shard].name for shard in shards_B.tolist()]
            held = [quarantine.holds(*sample) for sample in zip(names, places_B.tolist(), strict=True)]
            if not any(held):
                return shards_B, places_B
            slots = np.flatnonzero(held)
            epochs, within = np.divmod(positions_B[slots], self.samples)
            others = (within + attempt * REPLACEMENT_STRIDE) % self.samples
            shards_B[slots], places_B[slots] = self._order.samples_at(epochs * self.samples + others)
        raise DataError(f"data set {self._manifest.name}: no sample is left that decodes; mend it and pack again")


def _labels(manifest: Manifest, identities: IdentityTable) -> Ints:
    """(C_manifest,) row of each of the manifest's identities in the run's table, NO_ROW for those left out."""
    there = manifest.identities()
    missing = np.flatnonzero(there.rows_of(identities.column) == NO_ROW)
    if len(missing):
        raise DataError(
            f"{len(missing)} identities of the run are not in the data set, such as "
            f"{identities.column[int(missing[0])].as_py()!r}; "
            "choose the identities from the data set that is trained on"
        )
    return identities.rows_of(there.column)


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
    rows = np.arange(len(manifest.identities()))
    reader = ShardReader(folder, manifest, rows, limit=2)
    for work, images_BCHW in _decoded_once(reader, preprocess, batch_size, threads, device):
        yield images_BCHW, work.step * batch_size


def iterate_identities(
    folder: Path,
    manifest: Manifest,
    identities: IdentityTable,
    first_row: int,
    end_row: int,
    preprocess: PreprocessConfig,
    batch_size: int,
    *,
    threads: int = 1,
    device: str | torch.device = "cpu",
    store: ShardFiles | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode every sample of some identities once, in the shards' order, without augmentation.

    Args:
        folder: of the data set's metadata, and of its shards unless `store` has them.
        manifest: of the data set.
        identities: the run's table.
        first_row: of the table: the first of the identities.
        end_row: after the last.
        preprocess: what is done to an image.
        batch_size: samples at a time; the last batch may be shorter.
        threads: of the decoder.
        device: "cpu" or "cuda:N": where images are decoded, and left.
        store: of the shards; None: they lie in `folder`.

    Yields:
        (B, channels, size, size) float32 images, and their (B,) int64 rows of the table.

    Raises:
        DataError: a shard cannot be read, or a sample does not decode.
    """
    rows = _labels(manifest, identities)
    inside = (rows >= first_row) & (rows < end_row)
    reader = ShardReader(folder, manifest, np.where(inside, rows, NO_ROW), limit=2, store=store)
    for work, images_BCHW in _decoded_once(reader, preprocess, batch_size, threads, device):
        yield images_BCHW, torch.from_numpy(work.labels_B).to(images_BCHW.device)


def _decoded_once(
    reader: ShardReader, preprocess: PreprocessConfig, batch_size: int, threads: int, device: str | torch.device
) -> Iterator[tuple[Work, Tensor]]:
    """All samples that take part, in the shards' order."""
    assert batch_size > 0, "a batch holds at least one sample"
    starts = np.cumsum([0, *reader.selection.sizes()])
    total = int(starts[-1])

    def read(number: int) -> Work:
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, total))
        shards = np.searchsorted(starts, indices, side="right") - 1
        return reader.read(number, shards, indices - starts[shards])

    decoder = Decoder(preprocess, AugmentConfig(), 0, batch_size, threads, torch.device(device))
    yield from _decoded(reader, decoder, ReadAhead(read, range(-(-total // batch_size)), None, lambda: reader.at))
