"""The time of a step by its parts, with a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from pipeline import parts as module
from pipeline.parts import MOST_MARKS, PARTS, GpuClock, Parts, listening, part


class Hand:
    """A clock that goes on by what it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.read = 0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        self.read += 1
        return end - start


def test_of_nested_parts_only_the_innermost_runs_and_they_add_up() -> None:
    clock = Hand()
    parts = Parts(clock)
    with listening(parts):
        clock.now += 1  # other
        with part("load"):
            clock.now += 2
        with part("classifier"):
            clock.now += 4
            with part("gather"):
                clock.now += 8
                with part("other"):
                    clock.now += 16
            clock.now += 32
        clock.now += 64
    taken = parts.take()
    assert {name: seconds for name, seconds in taken.items() if seconds} == {
        "load": 2,
        "classifier": 36,
        "gather": 8,
        "other": 81,
    }
    assert list(taken) == list(PARTS)
    assert sum(taken.values()) == clock.now


def test_each_second_is_taken_once_also_of_a_part_that_goes_on() -> None:
    clock = Hand()
    parts = Parts(clock)
    with listening(parts), part("save"):
        clock.now = 3.0
        assert parts.take()["save"] == 3
        clock.now = 5.0
    clock.now = 9.0
    taken = parts.take()
    assert (taken["save"], taken["other"]) == (2, 4)
    assert sum(parts.take().values()) == 0


def test_a_part_that_fails_ends_and_so_does_the_listening() -> None:
    clock = Hand()
    parts = Parts(clock)

    def fail() -> None:
        with listening(parts), part("load"):
            clock.now = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now = 3.0
    with part("gather"):  # nobody listens
        clock.now = 7.0
    taken = parts.take()
    assert (taken["load"], taken["other"], taken["gather"]) == (1, 6, 0)
    assert module._listener is None


def test_marks_are_bounded_and_the_newest_are_not_read_before_they_are_asked_for() -> None:
    """On a GPU reading one waits for it."""
    clock = Hand()
    parts = Parts(clock)
    with listening(parts):
        for _ in range(MOST_MARKS // 2 - 1):
            with part("load"):
                clock.now += 1
        assert clock.read == 0
        for _ in range(5 * MOST_MARKS):
            with part("backbone"):
                clock.now += 1
                unread = len(parts._marks)
                assert MOST_MARKS // 2 <= unread <= MOST_MARKS
    taken = parts.take()
    assert (taken["load"], taken["backbone"]) == (MOST_MARKS // 2 - 1, 5 * MOST_MARKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpus_time_is_that_of_its_work_not_of_its_launch() -> None:
    parts, large = Parts(GpuClock()), torch.ones(4096, 4096, device="cuda")
    with listening(parts):
        with part("backbone"):
            for _ in range(50):
                large @ large
        with part("load"):
            pass
    taken = parts.take()
    assert taken["backbone"] > 10 * taken["load"]
