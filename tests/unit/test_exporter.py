"""What one rank exports, with notebooks in the place of Ray's gauges."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import ClassVar

import pytest

from pipeline.workers import metrics
from pipeline.workers.metrics import Exporter

Tags = dict[str, str]


class Notebook:
    """Writes down what is set."""

    written: ClassVar[defaultdict[str, list[tuple[float, Tags]]]] = defaultdict(list)
    each = threading.Condition()

    def __init__(self, name: str, told: str, tags: tuple[str, ...]) -> None:
        assert told
        self.name, self.tags = name, tags

    def set(self, value: float, tags: Tags) -> None:
        assert tags.keys() == set(self.tags), "Ray refuses others"
        with self.each:
            self.written[self.name].append((value, tags))
            self.each.notify_all()

    inc = set

    @classmethod
    def wait(cls, name: str, more: int) -> list[float]:
        """Values of a metric, once it was set so many times more."""
        with cls.each:
            wanted = len(cls.written[name]) + more
            assert cls.each.wait_for(lambda: len(cls.written[name]) >= wanted, timeout=60)
            return [value for value, _ in cls.written[name]]


@pytest.fixture(autouse=True)
def _notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Gauge", Notebook)
    monkeypatch.setattr(metrics, "Counter", Notebook)
    monkeypatch.setattr(metrics, "AGAIN_S", 0.01)
    Notebook.written.clear()


def test_figures_become_metrics_with_their_labels() -> None:
    exporter = Exporter("family", "v2", 3, 100)
    exporter.measured(10, {"time/step": 0.5, "time/load": 0.1, "mfu": 0.4, "unknown": 1.0})
    exporter.reported({"loss/v2": 3.0, "loss/v1": 2.0, "guards/unusable": 1.0})
    exporter.measured(30, {"time/step": 0.25})
    for name in ("bct_loss", "bct_step_seconds", "bct_unusable_steps"):
        Notebook.wait(name, 4)
    exporter.close()
    last = {(name, *sorted(tags.items())): value for name, notes in Notebook.written.items() for value, tags in notes}
    own = [("family", "family"), ("generation", "v2"), ("rank", "3")]

    def told(name: str, *more: tuple[str, str]) -> float:
        return last[name, *sorted([*own, *more])]

    assert told("bct_loss", ("loss", "v2")) == 3
    assert told("bct_loss", ("loss", "v1")) == 2
    assert told("bct_step_part_seconds", ("part", "load")) == 0.1
    assert told("bct_step_seconds") == 0.25, "the newest"
    assert (told("bct_step"), told("bct_planned_steps"), told("bct_mfu_ratio")) == (30, 100, 0.4)
    assert (told("bct_unusable_steps"), told("bct_loss_spikes")) == (1, 0), "nought is told, too"
    assert Notebook.written["bct_steps_total"] == [(20, dict(own))], "a counter counts what was done since"
    assert told("bct_training") == 0, "it has ended"


def test_all_is_told_again_and_again_while_nothing_happens_and_times_stand_still() -> None:
    """Ray forgets a gauge that is not set: a training that hangs would look like one that has ended."""
    exporter, before = Exporter("family", "v2", 0, 100), time.time()
    exporter.measured(10, {"checkpoint/age_s": 1000.0})
    Notebook.wait("bct_checkpoint_timestamp_seconds", 1)
    for name, expected in (("report", before), ("checkpoint", before - 1000)):
        values = Notebook.wait(f"bct_{name}_timestamp_seconds", 5)[-5:]
        assert len(set(values)) == 1
        assert values[0] == pytest.approx(expected, abs=60)
    assert Notebook.wait("bct_training", 2)[-1] == 1
    exporter.close()
    ended = {name: len(notes) for name, notes in Notebook.written.items()}
    exporter.measured(20, {})
    assert ended == {name: len(notes) for name, notes in Notebook.written.items() if name != "bct_steps_total"}
