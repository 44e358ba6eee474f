"""The tracker: sends a run's metrics to MLflow from a thread of its own.

A tracking server that is down never raises into a training step and never blocks one. MLflow, which takes seconds to
import, is imported in that thread.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.redaction import redacted
from pipeline.tracking.journal import Journal, Value
from pipeline.tracking.store import connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TICK_SECONDS = 0.5  # metrics logged within one tick travel in one request
MAX_BATCH = 1000  # MLflow's limit of metrics in a request
MAX_BACKOFF_SECONDS = 30.0
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}  # sending again cannot help


class MlflowTracker:
    """Sends one run's metrics from a thread of its own; `log` writes a line of the run's journal and never raises.

    The journal is the queue: what the server has not taken stays there, also when this process is killed, and is sent
    by the next tracker of the run, or by `Registry.log_journal` before its generation is registered. System metrics of
    this machine (CPU, memory, disk, network, NVIDIA GPUs if nvidia-ml-py is there) are sampled by the same thread,
    under MLflow's own names `system/...`; their step is the second since the run began, so that a resumed run goes on
    where it was.

    Each step of a metric is sent once, the first time that it is reported: not again by a run that resumes, nor by one
    that went back to a checkpoint after a spike.

    Args:
        uri: of the tracking store; with `run_id` and `journal`, all that a worker needs to build its tracker.
        run_id: of a run that exists.
        journal: the run's file, one and the same over resumes.
        system_every: seconds between samples of the system metrics; 0 turns them off.

    Attributes:
        unsent: values that are not with the server, once it is closed.
    """

    def __init__(self, uri: str, run_id: str, journal: Path, *, system_every: float = 10.0) -> None:
        self.uri, self.run_id, self.unsent = uri, run_id, 0
        self._journal = Journal(journal)
        self._system_every = system_every or math.inf
        self._sender: JournalSender | None = None
        self._stop = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name=f"mlflow-{run_id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over the metrics of one step."""
        try:
            self._journal.append(step, metrics)
        except OSError as error:
            self._complain(f"{self._journal.path} does not take the figures of the run", error, "they are lost")

    def close(self, timeout: float = 30.0) -> None:
        """Send what waits, for `timeout` seconds at most, and say on stderr what was not sent, if anything."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout)
        rest, _ = self._journal.read(self._sender.place if self._sender else 0, sys.maxsize)
        self.unsent = len(rest)
        if rest:
            kept = f"{self._journal.path} keeps them, until the run goes on or is registered"
            print(f"MLflow: {len(rest)} values of run {self.run_id} were not sent; {kept}", file=sys.stderr)

    def _run(self) -> None:
        client: MlflowClient | None = None
        system: _SystemMetrics | None = None
        failures = 0
        while True:
            last = self._stop.wait(TICK_SECONDS if not failures else min(MAX_BACKOFF_SECONDS, 2.0 ** (failures - 1)))
            try:
                client = client or connect(self.uri)
                self._sender = self._sender or JournalSender(client, self.run_id, self._journal)
                if self._system_every < math.inf:
                    system = system or _SystemMetrics(client, self.run_id, self._system_every)
                    system.sample(last, self._journal)
                if refused := self._sender.send():
                    self._complain_of_server(refused, "the values it refuses are lost")
                failures = 0
            except Exception as error:  # noqa: BLE001  whatever a store raises, training goes on
                failures += 1
                self._complain_of_server(error, f"{self._journal.path} keeps them until it does")
            if last:
                return

    def _complain_of_server(self, error: Exception, outcome: str) -> None:
        self._complain(f"{redacted(self.uri)} does not take the metrics of run {self.run_id}", error, outcome)

    def _complain(self, what: str, error: Exception, outcome: str) -> None:
        """Once: a log full of the same line helps nobody."""
        if not self._complained:
            self._complained = True
            print(f"MLflow: {what} ({first_line(error)}); training goes on, {outcome}", file=sys.stderr)


class JournalSender:
    """Brings a run's journal to MLflow, from where it is now.

    Attributes:
        place: in the journal, up to which all is sent.
    """

    def __init__(self, client: MlflowClient, run_id: str, journal: Journal) -> None:
        self.client, self.run_id, self.journal, self.place = client, run_id, journal, 0
        self._recorded: dict[str, int] | None = None  # the last step of each metric that the run has; None: ask

    def send(self) -> Exception | None:
        """Send what has come; the last refusal, if the store refused any of it for good.

        Raises:
            Exception: of the store's own; what it did not take is sent the next time.
        """
        from mlflow.entities import Metric

        refusal = None
        while True:
            values, place = self.journal.read(self.place, MAX_BATCH // 2)
            if place == self.place:
                return refusal
            recorded = _last_steps(self.client, self.run_id) if self._recorded is None else dict(self._recorded)
            new = [Metric(*value) for value in values if _is_new(value, recorded)]
            self._recorded = None  # a request whose answer is lost may have been taken
            for start in range(0, len(new), MAX_BATCH):
                refusal = self._log(new[start : start + MAX_BATCH]) or refusal
            self.place, self._recorded = place, recorded

    def _log(self, batch: list[Metric]) -> Exception | None:
        try:
            self.client.log_batch(self.run_id, batch, synchronous=True)
        except Exception as error:
            if getattr(error, "error_code", None) not in _REFUSALS:
                raise
            return error
        return None


def _is_new(value: Value, recorded: dict[str, int]) -> bool:
    """Whether a step of a metric was not recorded yet; from now on it is."""
    if value.step <= recorded.get(value.key, -1):
        return False
    recorded[value.key] = value.step
    return True


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """The last step of each metric that the run has from before."""
    try:
        data = client.get_run(run_id).data.to_proto()  # its own attributes leave the steps out
    except Exception as error:
        if getattr(error, "error_code", None) in _REFUSALS:
            return {}  # there is no such run: what is sent will be refused, and that is told
        raise
    return {metric.key: metric.step for metric in data.metrics}


class _SystemMetrics:
    """Samples this machine with MLflow's monitors.

    MLflow's own SystemMetricsMonitor thread is not used: it ends for good at the first request that fails, waits
    without bound when it is stopped, and has nothing to say of a run shorter than its interval.
    """

    def __init__(self, client: MlflowClient, run_id: str, every: float) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._started = client.get_run(run_id).info.start_time / 1000
        self._every = every
        self._due = time.monotonic() + every
        self._monitors: list[Any] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                self._monitors.append(kind())
            except Exception:  # noqa: BLE001  no GPU, no nvidia-ml-py, no /proc: do without
                continue
        self._collect()  # the first CPU percentage is always 0: there is no interval yet

    def sample(self, last: bool, journal: Journal) -> None:
        """Write down the values of now if a sample is due, or if it is the last chance."""
        if last or time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            step = max(0, int(time.time() - self._started))
            journal.append(step, {f"system/{key}": value for key, value in self._collect().items()})

    def _collect(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            except Exception:  # noqa: BLE001  a machine that cannot be measured still trains
                self._monitors.remove(monitor)
        return values
