"""Who is behind, what is a spike, and what is out of memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipeline.training.guards import free_bytes, is_out_of_memory
from pipeline.training.spikes import FEWEST, WINDOW, Course, deviations
from pipeline.training.watchdog import Beat, behind


def test_the_rank_that_entered_the_fewest_phases_is_named() -> None:
    beats = [Beat(9, 17, "losses", True), Beat(9, 17, "losses", True), Beat(8, 17, "forward", False)]
    assert behind(beats, 61.2) == "rank 2 has not finished step 17's forward for 61 s"


def test_among_equals_those_are_named_that_wait_for_nobody() -> None:
    beats = [Beat(9, 17, "update", True), Beat(9, 17, "update", False), Beat(9, 17, "update", True)]
    assert behind(beats, 5) == "rank 1 has not finished step 17's update for 5 s"
    alike = [Beat(9, 17, "update", True)] * 2
    assert behind(alike, 5) == "ranks 0, 1 have not finished step 17's update for 5 s"


def test_a_rank_without_any_beat_has_not_begun() -> None:
    assert behind([Beat(1, 0, "load", True), None], 7) == "rank 1 has not begun for 7 s"


def test_a_spike_is_told_at_its_first_step_and_the_next_one_again() -> None:
    course, generator = Course(), torch.Generator().manual_seed(0)
    noise = (1 + 0.1 * torch.randn(3 * WINDOW, generator=generator)).tolist()
    told = []
    for step, loss in enumerate(noise):
        spiked = step in (5, 40, 41, 42, 100)
        told.append((step, course.add(50.0 if spiked else loss, 30.0)))
    assert FEWEST > 5, "the first one comes before anything is said"
    assert [step for step, above in told if above is not None] == [40, 100]
    assert course.spikes == 2


def test_going_back_adds_up_what_was_left_out() -> None:
    course = Course()
    for batches in (3, 4):
        before = course.counts()
        for tensor in course.kept.values():
            tensor.zero_()  # as a checkpoint from before the first time would
        course.goes_back(batches, before)
    assert (course.rewinds, course.skipped) == (2, 7)


def test_deviations_are_those_of_a_normal_distribution() -> None:
    known = torch.randn(100_001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert deviations(3.0, known) == pytest.approx(3.0, abs=0.05)
    assert math.isfinite(deviations(1.0, torch.zeros(WINDOW, dtype=torch.float64)))


def test_out_of_memory_is_known_by_class_or_by_the_allocators_words() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 55)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def test_room_is_known_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
