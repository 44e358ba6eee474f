"""The order of samples: once an epoch each, the same at any world size and from any step; and the balanced one."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.balanced import BalancedOrder, samples_by_identity
from pipeline.data.order import BalancedConfig, Ints, Order, OrderConfig, SampleOrder, batch_positions, resume_step
from pipeline.errors import ConfigError, DataError

sizes_of_shards = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**31)
worlds = st.sampled_from([1, 2, 3, 4, 8])
blocks = st.integers(1, 5)
untimed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no fault


def make(sizes: list[int], digest: str = "data", seed: int = 0, block_shards: int = 3) -> SampleOrder:
    return SampleOrder(np.array(sizes, np.int64), digest, seed, block_shards)


def pairs(order: Order, positions: Ints) -> list[tuple[int, int]]:
    shards, places = order.samples_at(positions)
    return list(zip(shards.tolist(), places.tolist(), strict=True))


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
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
@given(sizes_of_shards, seeds, worlds, worlds, st.integers(8, 60), st.integers(0, 30))
def test_a_run_resumed_on_another_world_size_sees_the_same_batches(
    sizes: list[int], seed: int, before: int, after: int, batch: int, start: int
) -> None:
    unbroken = make(sizes, seed=seed)
    for world_size, steps in ((before, range(start)), (after, range(start, start + 3))):
        ranks = [make(sizes, seed=seed) for _ in range(world_size)]
        for step in steps:
            parts = [pairs(order, batch_positions(step, batch, r, world_size)) for r, order in enumerate(ranks)]
            assert [pair for part in parts for pair in part] == pairs(unbroken, batch_positions(step, batch))


@untimed
@given(sizes_of_shards, seeds, blocks, st.integers(1, 40))
def test_shards_are_told_before_they_are_needed(sizes: list[int], seed: int, block: int, batch: int) -> None:
    order = make(sizes, seed=seed, block_shards=block)
    for step in range(12):
        positions = batch_positions(step, batch)
        told, needed = order.shards_ahead(positions).tolist(), order.samples_at(positions)[0].tolist()
        (following,) = order.samples_at(positions[-1:] + 1)[0].tolist()
        assert {*needed, following} <= set(told)
        assert set(told[:block]) & set(needed), "what is read now comes first"
        assert all(sizes[shard] > 0 for shard in told)
        epochs = positions[-1] // order.samples - positions[0] // order.samples + 1
        assert len(told) <= block * (len(set(needed)) * epochs + 1), "blocks, not the data set"


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


State = dict[str, int | str]


@pytest.fixture
def state() -> State:
    order = OrderConfig().rule
    return {"step": 7, "manifest": "aa", "identities": "bb", "global_batch": 12, "seed": 3, "order": order}


def test_a_stored_state_of_the_same_run_gives_its_step(state: State) -> None:
    assert resume_step(state, state | {"step": 0}) == 7


@pytest.mark.parametrize(
    ("key", "stored", "error"),
    [
        ("manifest", "cc", DataError),
        ("identities", "cc", DataError),
        ("global_batch", 13, ConfigError),
        ("seed", 4, ConfigError),
        ("order", OrderConfig(block_shards=4).rule, ConfigError),
        ("order", OrderConfig(balanced=BalancedConfig(identities=3, images=4)).rule, ConfigError),
        ("seed", None, ConfigError),
    ],
)
def test_a_stored_state_of_another_run_is_refused(
    state: State, key: str, stored: int | str | None, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        resume_step({**state, key: stored}, state)
    assert f"are of {key} {stored!r}, this run's of {state[key]!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [-1, "7", 1.5, True, None])
def test_a_stored_state_without_a_step_is_refused(state: State, step: object) -> None:
    with pytest.raises(DataError, match=r"has step .*, not a count"):
        resume_step({**state, "step": step}, state)


def test_a_stored_state_with_nothing_in_it_is_refused(state: State) -> None:
    with pytest.raises((DataError, ConfigError), match=r"are of \w+ None"):
        resume_step({}, state)


def test_the_rule_tells_all_that_shapes_the_order() -> None:
    kinds = [{"block_shards": blocks} for blocks in (1, 16)]
    balanced: list[dict[str, Any]] = [{"balanced": {"identities": i, "images": k}} for i in (2, 3) for k in (2, 3)]
    assert len({OrderConfig.model_validate(kind).rule for kind in [*kinds, *balanced]}) == 6


# The balanced order, on data sets given as the identity of each sample of each shard.

Rows = list[list[int]]
data_sets = st.lists(st.lists(st.integers(0, 9).map(lambda row: 7 * row), max_size=15), min_size=1, max_size=6).filter(
    any
)


def parts_of(shards: Rows) -> Iterator[npt.NDArray[np.int32]]:
    for shard in shards:
        yield np.array(shard, np.int32)


def balance(shards: Rows, identities: int, images: int, seed: int = 0, digest: str = "data") -> BalancedOrder:
    sizes = np.array([len(shard) for shard in shards], np.int64)
    return BalancedOrder(sizes, parts_of(shards), digest, seed, BalancedConfig(identities=identities, images=images))


def images_of(shards: Rows) -> Counter[int]:
    return Counter(row for shard in shards for row in shard)


def turns_of(order: BalancedOrder, shards: Rows, images: int, epochs: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """(identity, its images) of each turn of the first epochs."""
    seen = pairs(order, np.arange(epochs * order.samples))
    groups = [seen[first : first + images] for first in range(0, len(seen), images)]
    identities = [{shards[shard][place] for shard, place in group} for group in groups]
    assert all(len(identity) == 1 for identity in identities), "a turn is of one identity"
    return [(identity.pop(), group) for identity, group in zip(identities, groups, strict=True)]


@dataclass(frozen=True)
class Case:
    """A data set and the make-up of its batches."""

    shards: Rows
    identities: int
    images: int
    seed: int

    def order(self) -> BalancedOrder:
        return balance(self.shards, self.identities, self.images, self.seed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = draw(data_sets)
    return Case(shards, draw(st.integers(1, len(images_of(shards)))), draw(st.integers(1, 6)), draw(seeds))


@untimed
@given(cases())
def test_a_balanced_batch_holds_different_identities_with_different_images(
    case: Case,
) -> None:
    shards, identities, images, order = case.shards, case.identities, case.images, case.order()
    count = images_of(shards)
    batches = -(-len(count) // identities)
    assert order.samples == batches * identities * images
    turns = turns_of(order, shards, images, 4)
    for first in range(0, len(turns), identities):
        batch = turns[first : first + identities]
        assert len({identity for identity, _ in batch}) == identities
        for identity, group in batch:
            often = Counter(group).values()
            whole, rest = divmod(images, count[identity])
            assert sorted(often) == [whole] * (min(count[identity], images) - rest) + [whole + 1] * rest or (
                count[identity] >= images and set(often) == {1}
            )


@untimed
@given(cases(), st.integers(1, 6))
def test_identities_come_up_equally_often(case: Case, epochs: int) -> None:
    shards, identities, images, order = case.shards, case.identities, case.images, case.order()
    turns = turns_of(order, shards, images, epochs)
    count = images_of(shards)
    length = len(turns) // epochs
    for epoch in range(epochs):
        often = Counter(identity for identity, _ in turns[epoch * length : (epoch + 1) * length])
        assert often.keys() == count.keys()
        assert sum(number == 2 for number in often.values()) == -len(count) % identities
        assert max(often.values()) <= 2
    often = Counter(identity for identity, _ in turns)
    assert max(often.values()) - min(often.values()) <= 1


@untimed
@given(cases())
def test_no_image_comes_again_before_all_of_its_identity_were_used(
    case: Case,
) -> None:
    shards, images, order = case.shards, case.images, case.order()
    count = images_of(shards)
    turns = turns_of(order, shards, images, 30)
    for identity, number in count.items():
        used = [pair for turn_identity, group in turns if turn_identity == identity for pair in group]
        length = -(-number // images) * images
        rounds = [used[first : first + length] for first in range(0, len(used) - length + 1, length)]
        assert rounds or length > len(used)
        for one in rounds:
            assert len(set(one[:number])) == number, "each once, and only then again"
        if rounds:
            often = Counter(pair for one in rounds for pair in one).values()
            assert max(often) - min(often) <= 1


@untimed
@given(cases(), worlds, st.integers(0, 20))
def test_balanced_batches_are_the_same_at_any_world_size_and_from_any_step(
    case: Case, world_size: int, start: int
) -> None:
    order, batch = case.order(), case.identities * case.images
    world_size = min(world_size, batch)
    unbroken = [pairs(order, batch_positions(step, batch)) for step in range(start + 3)]
    ranks = [case.order() for _ in range(world_size)]
    for step in range(start, start + 3):
        positions = [batch_positions(step, batch, rank, world_size) for rank in range(world_size)]
        ahead = [rank.shards_ahead(part).tolist() for rank, part in zip(ranks, positions, strict=True)]
        parts = [pairs(rank, part) for rank, part in zip(ranks, positions, strict=True)]
        assert [pair for part in parts for pair in part] == unbroken[step]
        assert all({shard for shard, _ in part} <= set(told) for part, told in zip(parts, ahead, strict=True))


@untimed
@given(cases(), st.permutations(range(50)))
def test_positions_of_a_balanced_order_may_come_in_any_order(case: Case, shuffled: list[int]) -> None:
    order = case.order()
    straight = pairs(order, np.arange(50))
    assert pairs(order, np.array(shuffled)) == [straight[position] for position in shuffled]


def test_the_images_of_an_identity_meet_in_changing_company() -> None:
    order = balance([[0] * 8, [1] * 8], identities=2, images=4)
    company = {frozenset(group) for _, group in turns_of(order, [[0] * 8, [1] * 8], 4, 60)}
    assert len(company) > 60, "of 120 turns; a fixed order would know 4 groups"


def test_balanced_epochs_seeds_and_data_sets_have_orders_of_their_own() -> None:
    shards = [[row % 6 for row in range(30)], [row % 5 for row in range(25)]]
    orders = [balance(shards, 3, 4), balance(shards, 3, 4, seed=1), balance(shards, 3, 4, digest="other")]
    drawn = [tuple(epoch_of(order, epoch)) for order in orders for epoch in (0, 1)]
    assert len(set(drawn)) == 6


def test_a_far_balanced_epoch_is_reached_without_the_ones_before_it() -> None:
    shards = [[row % 7 for row in range(40)]]
    far = [pairs(balance(shards, 4, 3), batch_positions(step, 12)) for step in (10**12, 10**12 + 1)]
    assert far[0] != far[1]
    seen = {shards[0][place] for _, place in far[0] + far[1]}
    assert seen == set(range(7)), "an epoch's two batches"


def test_the_balanced_order_is_the_documented_one() -> None:
    """Seven identities of five images, three and two at a time, written out by hand."""

    def permutation(count: int, what: str) -> list[int]:
        digest = hashlib.sha256(f"balanced:data:0:{what}".encode()).digest()
        key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
        bits = [int(bit) for bit in np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)]
        return sorted(range(count), key=bits.__getitem__)

    def one_round(count: int, size: int, number: int, what: str) -> list[int]:
        order, missing = permutation(count, f"{what}:{number}"), -count % size
        again = [place % count for place in range(number * missing, (number + 1) * missing)]
        last = [thing for thing in order if thing not in again][-(size - missing) :]
        return [*(thing for thing in order if thing not in last), *last, *again]

    shards = [[row % 7 for row in range(20)], [row % 7 for row in range(20, 35)]]
    everyone = [(shard, place, row) for shard, rows in enumerate(shards) for place, row in enumerate(rows)]
    had: Counter[int] = Counter()
    expected = []
    for epoch in range(4):
        for identity in one_round(7, 3, epoch, "identities"):
            images = [(shard, place) for shard, place, row in everyone if row == identity]
            number, part = divmod(had[identity], 3)
            chosen = one_round(5, 2, number, f"images:{identity}")[2 * part : 2 * part + 2]
            expected += [images[image] for image in chosen]
            had[identity] += 1
    assert pairs(balance(shards, 3, 2), np.arange(4 * 18)) == expected


def test_samples_are_grouped_by_identity() -> None:
    numbers, starts = samples_by_identity(7, parts_of([[5, 2], [], [5, 2**31 - 1, 2], [0, 5]]))
    groups = [numbers[start:stop].tolist() for start, stop in pairwise(starts.tolist())]
    assert groups == [[5], [1, 4], [0, 2, 6], [3]]
    assert numbers.dtype == np.uint32


def test_a_balanced_batch_of_more_identities_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="identities is 3, but only 2 identities take part; lower it"):
        balance([[4, 9, 4]], identities=3, images=1)
    with pytest.raises(DataError, match="no sample"):
        balance([[], []], identities=1, images=1)
