"""The tracker: sends a run's metrics to MLflow from a thread of its own.

A tracking server that is down never raises into a training step and never blocks one. MLflow, which takes seconds to
import, is imported in that thread.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pipeline.redaction import redacted
from pipeline.tracking.store import connect, first_line, metric_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

TICK_SECONDS = 0.5  # metrics logged within one tick travel in one request
MAX_BATCH = 1000  # MLflow's limit of metrics in a request
MAX_BACKOFF_SECONDS = 30.0
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}  # sending again cannot help


class _Value(NamedTuple):
    key: str
    value: float
    timestamp: int  # ms since the epoch
    step: int


class MlflowTracker:
    """Sends one run's metrics from a thread of its own; `log` costs a few microseconds and never raises.

    Values wait in a bounded buffer. If the server is down they are kept and sent when it answers; beyond the bound
    the oldest are dropped and counted. System metrics of this machine (CPU, memory, disk, network, NVIDIA GPUs if
    nvidia-ml-py is there) are sampled by the same thread, under MLflow's own names `system/...`; their step is the
    second since the run began, so that a resumed run goes on where it was.

    A run that resumes says again what it said after its last checkpoint. Steps of a metric that the run has already
    are not sent: each is recorded once.

    Args:
        uri: of the tracking store; with `run_id`, all that a worker needs to build its tracker.
        run_id: of a run that exists.
        system_every: seconds between samples of the system metrics; 0 turns them off.
        capacity: values kept while the server does not take them.

    Attributes:
        dropped: values that were lost so far.
    """

    def __init__(self, uri: str, run_id: str, *, system_every: float = 10.0, capacity: int = 100_000) -> None:
        self.uri = uri
        self.run_id = run_id
        self.dropped = 0
        self._system_every = system_every or math.inf
        self._capacity = capacity
        self._pending: deque[_Value] = deque()
        self._lock = threading.Lock()
        self._recorded: dict[str, int] | None = None
        self._stop = threading.Event()
        self._in_flight = 0
        self._complained = False
        self._thread = threading.Thread(target=self._run, name=f"mlflow-{run_id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over the metrics of one step. After `close` they are dropped."""
        now = int(time.time() * 1000)
        with self._lock:
            if self._stop.is_set():
                self.dropped += len(metrics)
                return
            self._pending.extend(_Value(metric_key(name), float(value), now, step) for name, value in metrics.items())
            self._trim()

    def close(self, timeout: float = 30.0) -> None:
        """Send what waits, for `timeout` seconds at most, and say on stderr what was lost, if anything."""
        if self._stop.is_set():
            return
        with self._lock:
            self._stop.set()
        self._thread.join(timeout)
        with self._lock:
            self.dropped += len(self._pending) + self._in_flight
            self._pending.clear()
        if self.dropped:
            print(f"MLflow: {self.dropped} values of run {self.run_id} were not recorded", file=sys.stderr)

    def _trim(self) -> None:
        while len(self._pending) > self._capacity:
            self._pending.popleft()
            self.dropped += 1

    def _run(self) -> None:
        client: MlflowClient | None = None
        system: _SystemMetrics | None = None
        failures = 0
        while True:
            last = self._stop.wait(TICK_SECONDS if not failures else min(MAX_BACKOFF_SECONDS, 2.0 ** (failures - 1)))
            try:
                client = client or connect(self.uri)
                if self._recorded is None:
                    self._recorded = _last_steps(client, self.run_id)
                if self._system_every < math.inf:
                    system = system or _SystemMetrics(client, self.run_id, self._system_every)
                    sampled = system.sample(last)
                    with self._lock:
                        self._pending.extend(sampled)
                        self._trim()
                self._send(client)
                failures = 0
            except Exception as error:  # noqa: BLE001  whatever a store raises, training goes on
                failures += 1
                self._complain(error, f"the last {self._capacity} values are kept until it does")
            if last:
                return

    def _send(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        recorded = self._recorded or {}
        while batch := self._take():
            new = [Metric(*value) for value in batch if value.step > recorded.get(value.key, -1)]
            try:
                client.log_batch(self.run_id, new, synchronous=True)
            except Exception as error:
                refused = getattr(error, "error_code", None) in _REFUSALS
                with self._lock:
                    self._in_flight = 0
                    if refused:
                        self.dropped += len(batch)
                    else:
                        self._pending.extendleft(reversed(batch))
                        self._trim()
                if not refused:
                    raise
                self._complain(error, "the values it refuses are lost")

    def _take(self) -> list[_Value]:
        with self._lock:
            batch = [self._pending.popleft() for _ in range(min(MAX_BATCH, len(self._pending)))]
            self._in_flight = len(batch)
            return batch

    def _complain(self, error: Exception, outcome: str) -> None:
        """Once: a log full of the same line helps nobody."""
        if not self._complained:
            self._complained = True
            print(
                f"MLflow: {redacted(self.uri)} does not take the metrics of run {self.run_id} ({first_line(error)}); "
                f"training goes on, {outcome}",
                file=sys.stderr,
            )


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

    def sample(self, last: bool) -> list[_Value]:
        """Values of now if a sample is due, or if it is the last chance; else none."""
        if not last and time.monotonic() < self._due:
            return []
        self._due = time.monotonic() + self._every
        now = time.time()
        step = max(0, int(now - self._started))
        return [_Value(f"system/{key}", float(value), int(now * 1000), step) for key, value in self._collect().items()]

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
