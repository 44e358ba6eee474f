"""Reading ahead, and reads that never end."""

from __future__ import annotations

import threading
from itertools import count, islice

import numpy as np
import pytest

from pipeline.data.read_ahead import READ_AHEAD, ReadAhead
from pipeline.data.reading import Work
from pipeline.errors import DataError


def work(number: int) -> Work:
    none = np.empty(0, np.int64)
    return Work(number, none, none, none, [])


def test_batches_come_in_order_and_no_more_are_read_than_asked_for() -> None:
    begun: list[int] = []

    def read(number: int) -> Work:
        begun.append(number)
        return work(number)

    ahead = ReadAhead(read, count(5), None, lambda: "a.tar")
    assert [each.step for each in islice(ahead, 4)] == [5, 6, 7, 8]
    assert ahead.end()
    assert begun == sorted(begun)
    assert len(begun) <= 4 + READ_AHEAD
    assert [each.step for each in ReadAhead(work, range(3), None, lambda: "a.tar")] == [0, 1, 2]


def test_failure_of_a_read_is_raised_where_its_batch_is_wanted() -> None:
    def read(number: int) -> Work:
        if number == 2:
            raise DataError("shard b.tar is missing")
        return work(number)

    ahead = iter(ReadAhead(read, count(), None, lambda: "b.tar"))
    assert [next(ahead).step, next(ahead).step] == [0, 1]
    with pytest.raises(DataError, match=r"shard b.tar is missing"):
        next(ahead)


def test_a_read_that_never_ends_is_told_with_its_batch_and_shard_and_left_behind() -> None:
    dead = threading.Event()

    def read(number: int) -> Work:
        if number == 3:
            dead.wait()
        return work(number)

    ahead = ReadAhead(read, count(2), 0.2, lambda: "shard-00017.tar")
    batches = iter(ahead)
    assert next(batches).step == 2
    with pytest.raises(DataError, match=r"batch 3 did not come in 0.2 s, while shard shard-00017.tar was read; "):
        next(batches)
    assert not ahead.end(), "and does not wait for it either"
    dead.set()
