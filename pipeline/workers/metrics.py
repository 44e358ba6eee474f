"""A rank's figures as metrics of Ray's, which Prometheus scrapes from every node.

Ray puts `ray_` in front of the names. Each rank exports its own. Ray forgets a gauge that was not set for twice its
`metrics_report_interval_ms` (20 s); so a thread sets all of them again and again, also while a step takes long, or
hangs in a collective: then the times that stand still are what an alert needs. They end with the rank's training.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

TAGS = ("family", "generation", "rank")
AGAIN_S = 2.0  # between two times that all gauges are set


@dataclass(frozen=True)
class Series:
    """One gauge.

    Attributes:
        figure: of which figure; `loss/` stands for each `loss/NAME`.
        name: of the metric.
        told: what it is, for people.
        tag: that holds NAME; empty where there is none.
    """

    figure: str
    name: str
    told: str
    tag: str = ""


GAUGES = (
    Series("loss/", "bct_loss", "loss of the last reported step, over the global batch", "loss"),
    Series("grad_norm/", "bct_gradient_norm", "norm of a gradient before clipping", "of"),
    Series("samples_per_s", "bct_samples_per_second", "samples of all ranks"),
    Series("guards/unusable", "bct_unusable_steps", "steps on which nobody moved: a loss or gradient was no number"),
    Series("guards/spikes", "bct_loss_spikes", "times that the loss leapt"),
    Series("time/step", "bct_step_seconds", "mean duration of a step since the last report"),
    Series("time/", "bct_step_part_seconds", "mean time of a step in each part; they add up to the step", "part"),
    Series("flops_per_s", "bct_flops_per_second", "arithmetic of the model that this rank does, operations a second"),
    Series("mfu", "bct_mfu_ratio", "share of the peak of the rank's device; absent where the peak is not known"),
    Series("data/quarantined", "bct_quarantined_samples", "samples that this rank knows not to decode"),
    Series("data/queue", "bct_loader_queue_batches", "batches that are read and wait to be decoded"),
    Series(
        "checkpoint/age_s",
        "bct_checkpoint_timestamp_seconds",
        "Unix time up to which work is safe: of the last whole checkpoint, else of the start",
    ),
    Series("step", "bct_step", "updates done"),
    Series("steps", "bct_planned_steps", "updates of the whole training"),
    Series("report", "bct_report_timestamp_seconds", "Unix time of the rank's last report, or of its start"),
    Series("training", "bct_training", "1 while the rank trains this generation, 0 once it has ended"),
)
STEPS = "bct_steps_total"  # a counter, of the updates that this process has done
TAG_OF = {one.figure: one.tag for one in GAUGES}
ALWAYS = ("guards/unusable", "guards/spikes")  # 0 until there was one


class Exporter:
    """Exports what one rank tells of the training of one generation.

    Args:
        family: of the generation.
        generation: its name.
        rank: this one.
        steps: of the whole training.
    """

    def __init__(self, family: str, generation: str, rank: int, steps: int) -> None:
        self._tags = {"family": family, "generation": generation, "rank": str(rank)}
        self._gauges = {one.figure: Gauge(one.name, one.told, (*TAGS, one.tag) if one.tag else TAGS) for one in GAUGES}
        self._steps = Counter(STEPS, "updates that this process has done", TAGS)
        self._last: int | None = None
        self._known = {"training": 1.0, "steps": float(steps), "report": time.time()} | dict.fromkeys(ALWAYS, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._again, name="metrics", daemon=True)
        self._thread.start()

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """A rank's own figures after `step` updates."""
        now = time.time()
        if self._last is not None and step > self._last:
            self._steps.inc(step - self._last, self._tags)
        self._last = step
        figures = figures | {"step": float(step), "report": now}
        if "checkpoint/age_s" in figures:
            figures["checkpoint/age_s"] = now - figures["checkpoint/age_s"]
        self._known = self._known | figures  # another one: the thread goes through the old one

    def reported(self, figures: dict[str, float]) -> None:
        """Rank 0's figures of the whole run."""
        self._known = self._known | figures

    def close(self) -> None:
        """The training has ended: what is exported is of the past."""
        self._ended.set()
        self._thread.join()
        self._export({"training": 0.0})

    def _again(self) -> None:
        while not self._ended.wait(AGAIN_S):
            self._export(self._known)

    def _export(self, figures: dict[str, float]) -> None:
        """Set the gauges of those figures that have one."""
        for name, value in figures.items():
            kind, slash, rest = name.partition("/")
            series = name if name in self._gauges else kind + slash
            if series in self._gauges:
                tag = TAG_OF[series]
                self._gauges[series].set(value, self._tags | ({tag: rest} if tag else {}))
