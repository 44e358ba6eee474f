"""The order of samples: once an epoch each, the same at any world size and from any step."""

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.order import Ints, OrderConfig, SampleOrder, batch_positions
from pipeline.errors import ConfigError, DataError

sizes_of_shards = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**31)
blocks = st.integers(1, 5)
untimed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no fault


def make(sizes: list[int], digest: str = "data", seed: int = 0, block_shards: int = 3) -> SampleOrder:
    return SampleOrder(np.array(sizes, np.int64), digest, seed, block_shards)


def pairs(order: SampleOrder, positions: Ints) -> list[tuple[int, int]]:
    shards, places = order.samples_at(positions)
    return list(zip(shards.tolist(), places.tolist(), strict=True))


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    return pairs(order, np.arange(order.samples) + epoch * order.samples)


def everything(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


@untimed
@given(sizes_of_shards, seeds, blocks, st.integers(0, 10**6))
def test_an_epoch_holds_every_sample_exactly_once(sizes: list[int], seed: int, block: int, epoch: int) -> None:
    order = make(sizes, seed=seed, block_shards=block)
    assert order.samples == sum(sizes)
    assert sorted(epoch_of(order, epoch)) == everything(sizes)


@untimed
@given(sizes_of_shards, seeds, blocks)
def test_a_block_of_shards_is_finished_before_the_next_begins(sizes: list[int], seed: int, block: int) -> None:
    shards = [shard for shard, _ in epoch_of(make(sizes, seed=seed, block_shards=block), 0)]
    # an empty shard takes a seat in a block without being seen, so there may be fewer shards at once, never more
    last_seen = {shard: place for place, shard in enumerate(shards)}
    first_seen = {shard: shards.index(shard) for shard in last_seen}
    open_at_once = [sum(first_seen[s] <= place <= last_seen[s] for s in last_seen) for place in range(len(shards))]
    assert max(open_at_once) <= block


@untimed
@given(sizes_of_shards, seeds, st.sampled_from([1, 2, 3, 4, 8]), st.integers(8, 200), st.integers(0, 40))
def test_ranks_together_take_the_global_batch_in_order(
    sizes: list[int], seed: int, world_size: int, global_batch: int, step: int
) -> None:
    parts = [batch_positions(step, global_batch, rank, world_size) for rank in range(world_size)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    whole = batch_positions(step, global_batch)
    assert np.array_equal(whole, np.arange(step * global_batch, (step + 1) * global_batch))
    assert np.array_equal(np.concatenate(parts), whole)
    by_rank = [pair for part in parts for pair in pairs(make(sizes, seed=seed), part)]
    assert by_rank == pairs(make(sizes, seed=seed), whole)


@untimed
@given(sizes_of_shards, seeds, st.integers(1, 100), st.integers(0, 30))
def test_a_resumed_run_sees_the_same_batches(sizes: list[int], seed: int, batch: int, start: int) -> None:
    unbroken = make(sizes, seed=seed)
    seen = [pairs(unbroken, batch_positions(step, batch)) for step in range(start + 3)]
    resumed = make(sizes, seed=seed)
    assert [pairs(resumed, batch_positions(step, batch)) for step in range(start, start + 3)] == seen[start:]


@untimed
@given(sizes_of_shards, st.integers(1, 10))
def test_a_batch_larger_than_an_epoch_holds_whole_epochs(sizes: list[int], epochs: int) -> None:
    order = make(sizes)
    drawn = pairs(order, batch_positions(1, epochs * order.samples))
    assert sorted(drawn) == sorted(everything(sizes) * epochs)


@untimed
@given(sizes_of_shards, seeds, st.permutations(range(50)))
def test_positions_may_come_in_any_order(sizes: list[int], seed: int, shuffled: list[int]) -> None:
    straight = pairs(make(sizes, seed=seed), np.arange(50))
    assert pairs(make(sizes, seed=seed), np.array(shuffled)) == [straight[position] for position in shuffled]


def test_epochs_seeds_and_data_sets_have_orders_of_their_own() -> None:
    sizes = [10, 20, 30, 5]
    first = epoch_of(make(sizes), 0)
    others = [epoch_of(make(sizes), 1), epoch_of(make(sizes, digest="other"), 0), epoch_of(make(sizes, seed=1), 0)]
    assert all(first != other for other in others)
    assert len({tuple(other) for other in others}) == 3
    assert first != everything(sizes)


def test_the_order_is_the_documented_one() -> None:
    """Sorts of Philox streams keyed by sha256, written out by hand: an order that changes breaks every resume."""

    def permutation(count: int, what: str) -> list[int]:
        digest = hashlib.sha256(f"order:data:7:{what}".encode()).digest()
        key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
        bits = [int(bit) for bit in np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)]
        return sorted(range(count), key=bits.__getitem__)

    sizes = [4, 0, 3, 5, 2]
    shards = permutation(5, "2:shards")
    expected = []
    for block in range(3):
        there = [(shard, place) for shard in shards[2 * block : 2 * block + 2] for place in range(sizes[shard])]
        expected += [there[place] for place in permutation(len(there), f"2:block:{block}")]
    assert epoch_of(make(sizes, seed=7, block_shards=2), 2) == expected


def test_samples_are_mixed_evenly() -> None:
    """Over many epochs, each sample of one block stands in the first tenth about one time in ten."""
    order = make([25] * 4, block_shards=4)
    early = np.zeros((4, 25))
    for epoch in range(2000):
        np.add.at(early, order.samples_at(np.arange(10) + epoch * 100), 1)
    expected, deviation = 200, np.sqrt(2000 * 0.1 * 0.9)
    assert np.abs(early - expected).max() < 4.5 * deviation


def test_a_far_epoch_is_reached_without_the_ones_before_it() -> None:
    order, far = make([1000, 0, 70, 1000]), 10**12
    assert sorted(epoch_of(order, far)) == everything([1000, 0, 70, 1000])
    assert epoch_of(order, far) != epoch_of(order, far + 1)


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        make([0, 0])


def test_a_batch_smaller_than_the_world_is_an_error() -> None:
    with pytest.raises(ConfigError, match="global batch of 3 samples is shared by 4 ranks"):
        batch_positions(0, 3, rank=0, world_size=4)


def test_the_block_is_sixteen_shards_by_default() -> None:
    assert OrderConfig().block_shards == 16
