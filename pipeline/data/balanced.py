"""An order in which each global batch holds so many identities with so many images of each.

Like the other order a pure function of (data set digest, seed, epoch), whatever the number of ranks, but one that
reads from all over the shards: it wants the data set on a fast local disk, or in memory.

Both the identities of an epoch and the images of an identity are taken in rounds. A round takes each of `count`
things once, in a random order, so many at a time; where its last part is short, things are taken again, the next
ones of 0, 1, ..., count - 1, 0, ... from round to round. Those are moved out of that part's other places, so that
all are different within a part if there are enough of them, and over the rounds each comes up equally often.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.data.catalogue import Selection
from pipeline.data.order import BalancedConfig, Ints, Order, OrderConfig, SampleOrder, keyed_permutation
from pipeline.errors import ConfigError, DataError

KEPT_TURNS = 4  # batches whose turns are remembered: a batch's are asked for ahead of it, and by it


class BalancedOrder:
    """Where the sample of each position stands: (shard, place in the shard).

    A turn is one identity's images in one batch: positions [turn * images, (turn + 1) * images). An epoch gives
    each identity its turn, in ceil(identities / identities of a batch) batches; it never ends within a batch.
    An identity's turns go through its images in rounds of ceil(its images / images of a turn) turns, and none comes
    again before all were used. With fewer images than a turn has, each stands in it floor or ceil(images of a
    turn / its images) times.

    Memory is 4 bytes a sample, and 12 an identity; twelve a sample while it is built.

    Args:
        shard_sizes: (S,) samples of each shard that take part; 0 is allowed.
        rows: row in the data set's table of each of these samples, shard after shard, in parts of any length.
        digest: of the data set and of what is chosen of it; another digest gives another order.
        seed: of the run.
        balanced: the make-up of a batch.

    Raises:
        DataError: there is no sample at all.
        ConfigError: a batch would hold more identities than there are.
    """

    def __init__(
        self,
        shard_sizes: Ints,
        rows: Iterable[npt.NDArray[np.int32]],
        digest: str,
        seed: int,
        balanced: BalancedConfig,
    ) -> None:
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        if self._shard_starts[-1] == 0:
            raise DataError("the data set has no sample to put in order: check the shards and the chosen identities")
        self._numbers, self._starts = samples_by_identity(int(self._shard_starts[-1]), rows)
        self._identities = len(self._starts) - 1
        if self._identities < balanced.identities:
            raise ConfigError(
                f"data.order.balanced.identities is {balanced.identities}, but only {self._identities} identities take "
                "part; lower it"
            )
        self._digest, self._seed, self._balanced = digest, seed, balanced
        self._again = -self._identities % balanced.identities  # identities that an epoch takes a second time
        self.samples = (self._identities + self._again) * balanced.images
        self._epoch = lru_cache(maxsize=1)(self._draw_epoch)
        self._turn = lru_cache(maxsize=KEPT_TURNS * balanced.identities)(self._draw_turn)

    def samples_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Find the samples of `positions`.

        Args:
            positions: (B,) places in the endless order, at least 0, in any order.

        Returns:
            (B,) shards and (B,) places among the shard's samples that take part.
        """
        positions = np.asarray(positions, np.int64)
        assert not (positions < 0).any(), "the order begins at position 0"
        turns, places = np.divmod(positions, self._balanced.images)
        different, which = np.unique(turns, return_inverse=True)
        numbers_TK = np.array([self._turn(turn) for turn in different.tolist()]).reshape(-1, self._balanced.images)
        numbers = numbers_TK[which, places]
        shards = np.searchsorted(self._shard_starts, numbers, side="right") - 1
        return shards, numbers - self._shard_starts[shards]

    def shards_ahead(self, positions: Ints) -> Ints:
        """Find the shards that are read for `positions`, and for the next batch's."""
        batch = self._balanced.identities * self._balanced.images
        return np.concatenate([np.unique(self.samples_at(positions + ahead)[0]) for ahead in (0, batch)])

    def _draw_epoch(self, epoch: int) -> npt.NDArray[np.int32]:
        """Identities of an epoch's turns, in order."""
        return self._round(self._identities, self._balanced.identities, epoch, "identities").astype(np.int32)

    def _draw_turn(self, turn: int) -> Ints:
        """Numbers of the samples of one turn, (images,), counted over all that take part."""
        epoch, place = divmod(turn, self._identities + self._again)
        identity = int(self._epoch(epoch)[place])
        # a turn in each epoch, and those beyond: `identity` is every `identities`-th of the ones taken again
        taken_again = (epoch * self._again + self._identities - 1 - identity) // self._identities
        nth = epoch + taken_again + (place >= self._identities)
        start, stop = self._starts[identity : identity + 2].tolist()
        images = self._balanced.images
        number, part = divmod(nth, -(-(stop - start) // images))
        chosen = self._round(stop - start, images, number, f"images:{identity}")[part * images :][:images]
        numbers: Ints = self._numbers[start + chosen].astype(np.int64)
        return numbers

    def _round(self, count: int, size: int, number: int, what: str) -> Ints:
        """Order of the things of round `number`: (ceil(count / size) * size,) of range(count), as told above."""
        order = keyed_permutation(count, f"balanced:{self._digest}:{self._seed}:{what}:{number}")
        missing = -count % size
        if missing == 0:
            return order
        again = (number * missing + np.arange(missing)) % count
        comes_again = np.zeros(count, bool)
        comes_again[again] = True
        last = np.flatnonzero(~comes_again[order])[missing - size :]
        return np.concatenate([np.delete(order, last), order[last], again])


def samples_by_identity(samples: int, rows: Iterable[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.uint32], Ints]:
    """Group samples by identity.

    Args:
        samples: how many there are.
        rows: row of each, at least 0, in parts of any length.

    Returns:
        (samples,) numbers of the samples, identity after identity by row and ascending within each, and
        (I + 1,) where each of the I identities that have samples begins among them.
    """
    assert samples <= 1 << 32, "numbers of samples are kept in four bytes"
    keys = np.empty(samples, "<u8")  # row and number in one: sorting it needs no second array
    filled = 0
    for part in rows:
        piece = keys[filled : filled + len(part)]
        piece[:] = part
        piece <<= 32
        piece |= np.arange(filled, filled + len(part), dtype=np.uint64)
        filled += len(part)
    assert filled == samples, "one row a sample"
    keys.sort()
    numbers, sorted_rows = keys.view("<u4")[::2], keys.view("<u4")[1::2]
    edges = np.flatnonzero(sorted_rows[1:] != sorted_rows[:-1]) + 1
    return numbers.copy(), np.concatenate([[0], edges, [samples]])


def order_of(selection: Selection, config: OrderConfig, digest: str, seed: int, global_batch: int) -> Order:
    """The order of samples that a config asks for.

    Args:
        selection: the samples that take part.
        config: which order.
        digest: of the data set.
        seed: of the run.
        global_batch: samples of a step over all ranks.

    Raises:
        DataError: no sample takes part, or the catalogue is broken.
        ConfigError: the make-up of a balanced batch is not this batch's, or there are too few identities for it.
    """
    if (balanced := config.balanced) is None:
        return SampleOrder(selection.sizes(), digest, seed, config.block_shards)
    if global_batch != balanced.identities * balanced.images:
        raise ConfigError(
            f"training.global_batch is {global_batch}, but data.order.balanced makes {balanced.identities} identities "
            f"x {balanced.images} images = {balanced.identities * balanced.images}; make them agree"
        )
    return BalancedOrder(selection.sizes(), selection.rows(), digest, seed, balanced)
