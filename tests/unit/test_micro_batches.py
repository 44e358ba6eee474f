"""How an update is cut, on any number of processes."""

from __future__ import annotations

import itertools

import pytest

from pipeline.errors import ConfigError
from pipeline.training.micro_batches import accumulation_on, first_sample, micro_parts


def pieces(global_batch: int, accumulation: int, ranks: int) -> set[tuple[int, int]]:
    """(first sample, samples) of all micro-batches."""
    parts = micro_parts(global_batch, accumulation, ranks)
    return {
        (first_sample(parts, rank, micro), parts[micro][rank])
        for rank, micro in itertools.product(range(ranks), range(accumulation))
    }


@pytest.mark.parametrize("global_batch", [32, 48, 97])
@pytest.mark.parametrize(("full", "accumulation"), [(1, 1), (4, 1), (4, 3), (3, 2), (6, 1)])
def test_fewer_processes_have_no_larger_micro_batches_and_leave_no_sample_out(
    global_batch: int, full: int, accumulation: int
) -> None:
    at_full = pieces(global_batch, accumulation, full)
    for ranks in range(1, full + 1):
        more = accumulation_on(ranks, full, accumulation, global_batch)
        cut = pieces(global_batch, more, ranks)
        assert sorted(itertools.chain.from_iterable(range(first, first + size) for first, size in cut)) == list(
            range(global_batch)
        )
        assert max(size for _, size in cut) <= max(size for _, size in at_full)
        if full * accumulation % ranks == 0 and global_batch % (full * accumulation) == 0:
            assert cut == at_full, "the same micro-batches, done by fewer"
    assert accumulation_on(full, full, accumulation, global_batch) == accumulation


def test_batch_that_is_hardly_larger_than_the_processes_still_gives_each_a_sample() -> None:
    assert accumulation_on(3, 4, 1, 5) == 1
    assert pieces(5, 1, 3) == {(0, 1), (1, 2), (3, 2)}


def test_too_small_a_batch_is_told() -> None:
    with pytest.raises(ConfigError, match="leaves nothing for some of 3 processes in 2 micro-batches"):
        micro_parts(5, 2, 3)
