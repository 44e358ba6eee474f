"""The order of samples: a pure function of (data set digest, seed, epoch), whatever the number of ranks.

Shards are permuted, taken in blocks of `block_shards`, and the samples of a block permuted among themselves, so
that a reader needs one block of shards at hand (two at a block's edge). The orders of all epochs stand end to
end: position p is place p % samples of epoch p // samples, and global batch t is positions [t * B, (t + 1) * B).
Nothing is dropped and no batch is short: a batch may hold the end of one epoch and the start of the next.

The other order, of so many identities with so many images each, is in `balanced.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.errors import ConfigError, DataError
from pipeline.model.rows import batch_parts
from pipeline.schema import Config

Ints = npt.NDArray[np.int64]
SCATTERED_FILES = 256  # open at once where samples come from all over the shards; systems often allow 1024
OF_THE_DATA = frozenset({"manifest", "identities"})  # keys of a loader's state that are no setting


class BalancedConfig(Config):
    """The make-up of a batch: global_batch = identities * images."""

    identities: int = Field(ge=1, description="different identities of a global batch")
    images: int = Field(ge=1, description="images of each of them")


class OrderConfig(Config):
    """Which samples come together."""

    block_shards: int = Field(16, ge=1, description="shards whose samples are mixed with each other, and read at once")
    balanced: BalancedConfig | None = Field(
        None, description="so many identities with so many images in each batch, read from all over the shards"
    )

    @property
    def rule(self) -> str:
        """All that shapes the order, in words: what a checkpoint remembers."""
        if self.balanced is None:
            return f"mixed in blocks of {self.block_shards} shards"
        return f"{self.balanced.identities} identities x {self.balanced.images} images"

    @property
    def open_shards(self) -> int:
        """Files that a reader holds open: a batch may read the end of one block and the start of the next."""
        return 2 * self.block_shards if self.balanced is None else SCATTERED_FILES


class Order(Protocol):
    """An endless order of samples; a sample is (shard, place among the shard's samples that take part).

    Attributes:
        samples: positions of an epoch.
    """

    samples: int

    def samples_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """(B,) shards and (B,) places of the (B,) positions, which are at least 0, in any order."""
        ...

    def shards_ahead(self, positions: Ints) -> Ints:
        """Shards of a batch's positions and of those soon after, the first needed first; some may stand twice."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of shards: `shards` (S,), and where each begins in the epoch, `starts` (S + 1,)."""

    shards: Ints
    starts: Ints


class SampleOrder:
    """Where the sample of each position stands: (shard, place in the shard).

    Memory is O(shards) and the permutations of four blocks; nothing is kept a sample.

    Args:
        shard_sizes: (S,) samples of each shard that take part; 0 is allowed.
        digest: of the data set and of what is chosen of it; another digest gives another order.
        seed: of the run.
        block_shards: shards in a block.

    Raises:
        DataError: there is no sample at all.
    """

    def __init__(self, shard_sizes: Ints, digest: str, seed: int, block_shards: int = 16) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        assert self._sizes.ndim == 1, "one size a shard"
        assert block_shards > 0, "a block holds at least one shard"
        assert not (self._sizes < 0).any(), "sizes are counts"
        self.samples = int(self._sizes.sum())
        if self.samples == 0:
            raise DataError("the data set has no sample to put in order: check the shards and the chosen identities")
        self._digest, self._seed, self._block_shards = digest, seed, block_shards
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def samples_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Find the samples of `positions`.

        Args:
            positions: (B,) places in the endless order, at least 0, in any order.

        Returns:
            (B,) shards and (B,) places among the shard's samples that take part.
        """
        positions = np.asarray(positions, np.int64)
        assert not (positions < 0).any(), "the order begins at position 0"
        shards, places = np.empty_like(positions), np.empty_like(positions)
        epochs, within = np.divmod(positions, self.samples)
        for epoch in np.unique(epochs).tolist():
            in_epoch = np.flatnonzero(epochs == epoch)
            shards[in_epoch], places[in_epoch] = self._samples_of_epoch(epoch, within[in_epoch])
        return shards, places

    def shards_ahead(self, positions: Ints) -> Ints:
        """Find the shards that are read for `positions` or soon after: their blocks, and the block that follows.

        Args:
            positions: (B,) of one batch.

        Returns:
            (W,) shards, block after block; none without a sample that takes part.
        """
        position, last = int(positions.min()), int(positions.max())
        windows: list[Ints] = []
        beyond = False
        while not beyond:
            beyond = position > last
            epoch, within = divmod(position, self.samples)
            order = self._epoch(epoch)
            block = (int(np.searchsorted(order.starts, within, side="right")) - 1) // self._block_shards
            window = order.shards[block * self._block_shards :][: self._block_shards]
            windows.append(window[self._sizes[window] > 0])
            position = epoch * self.samples + int(order.starts[block * self._block_shards + len(window)])
        return np.concatenate(windows)

    def _samples_of_epoch(self, epoch: int, within: Ints) -> tuple[Ints, Ints]:
        """Shards and places of the places `within` one epoch."""
        order = self._epoch(epoch)
        nth_shards = np.searchsorted(order.starts, within, side="right") - 1
        blocks = nth_shards // self._block_shards
        for block in np.unique(blocks).tolist():
            in_block = np.flatnonzero(blocks == block)
            first = order.starts[block * self._block_shards]
            within[in_block] = first + self._block(epoch, block)[within[in_block] - first]
        nth_shards = np.searchsorted(order.starts, within, side="right") - 1
        return order.shards[nth_shards], within - order.starts[nth_shards]

    def _draw_epoch(self, epoch: int) -> _Epoch:
        """Draw the order of the shards."""
        shards = self._permutation(len(self._sizes), f"{epoch}:shards")
        return _Epoch(shards, np.concatenate([[0], np.cumsum(self._sizes[shards])]))

    def _draw_block(self, epoch: int, block: int) -> Ints:
        """Draw the order of the samples of one block, as offsets from the block's first sample."""
        starts = self._epoch(epoch).starts[block * self._block_shards :][: self._block_shards + 1]
        return self._permutation(int(starts[-1] - starts[0]), f"{epoch}:block:{block}")

    def _permutation(self, count: int, what: str) -> Ints:
        return keyed_permutation(count, f"order:{self._digest}:{self._seed}:{what}")


def keyed_permutation(count: int, key: str) -> Ints:
    """Permute range(count) by sorting a Philox stream keyed by what is permuted.

    NumPy promises the raw bits of a bit generator for good, but not what Generator.permutation makes of
    them: with the sort, an upgrade of NumPy in the middle of a run does not change its batches.
    """
    digest = hashlib.sha256(key.encode()).digest()[:16]
    bits = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")


def batch_positions(step: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Ints:
    """Positions that rank `rank` takes of global batch `step`: the ranks' parts, in order, are the whole batch.

    Raises:
        ConfigError: the batch is smaller than the number of ranks, so that a rank would have nothing to do.
    """
    assert step >= 0, "steps count from 0"
    assert 0 <= rank < world_size, "ranks count from 0"
    if global_batch < world_size:
        raise ConfigError(
            f"global batch of {global_batch} samples is shared by {world_size} ranks; give each at least one"
        )
    edges = [0, *accumulate(batch_parts(global_batch, world_size))]
    return np.arange(edges[rank], edges[rank + 1], dtype=np.int64) + step * global_batch


def resume_step(stored: Mapping[str, object], present: Mapping[str, int | str]) -> int:
    """Find the step to go on from, once it is sure that its batches are those of the run that stored the state.

    Args:
        stored: state of the loader that a checkpoint holds.
        present: state of the loader that is to go on.

    Raises:
        DataError: it was stored of another data set or other identities, or has no step.
        ConfigError: it was stored of another global batch, seed or order.
    """
    for key, value in present.items():
        if key != "step" and stored.get(key) != value:
            error = DataError if key in OF_THE_DATA else ConfigError
            raise error(
                f"the checkpoint's batches are of {key} {stored.get(key)!r}, this run's of {value!r}: "
                f"give the run the checkpoint's {key}, or start anew"
            )
    step = stored.get("step")
    if type(step) is not int or step < 0:
        raise DataError(f"the checkpoint's state has step {step!r}, not a count; take an earlier checkpoint")
    return step
