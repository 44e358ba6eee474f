"""What Ray Train's errors mean."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipeline.errors import PipelineError
from pipeline.redaction import redacted


def users_mistake(error: BaseException | None) -> PipelineError | None:
    """The PipelineError at the bottom of what Ray wraps a worker's exception in, if there is one."""
    seen: list[BaseException] = []
    pending: list[Any] = [error]
    while pending:
        one = pending.pop()
        if isinstance(one, PipelineError):
            return one
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            failures = getattr(one, "worker_failures", {})
            pending += [one.__cause__, getattr(one, "cause", None), getattr(one, "_base_exc", None), *failures.values()]
    return None


def last_words(error: BaseException) -> str:
    """The last line that says something, of an error of many."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    told = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return redacted(lines[-1])[:300] if lines else type(told).__name__


def waited_in_vain(error: BaseException) -> bool:
    """Whether the workers never began, for want of a place: others use it, or a node went in that moment."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
