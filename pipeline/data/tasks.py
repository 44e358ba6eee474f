"""Many Ray tasks, a window of them at a time, with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import ray

from pipeline.errors import ClusterError, PipelineError

WINDOW = 256  # tasks that Ray knows of at once; their arguments wait in its memory

Progress = Callable[[int, int, str], None]  # done, of how many, what is done


def silent(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody watches."""


def run_tasks(
    function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], total: int, report: Progress, what: str
) -> list[Any]:
    """Call a function for each tuple of arguments, on the cluster, and return the results in order.

    Args:
        function: may run more than once for the same arguments.
        arguments: object references among them are resolved by Ray.
        total: how many tuples there are.
        report: called as tasks end.
        what: is done; for `report`.

    Raises:
        PipelineError: of a task, as it is; the tasks that wait or run are cancelled.
        OSError: of a task.
        ClusterError: Ray lost a task.
    """
    task = ray.remote(function)
    results: list[Any] = [None] * total
    running: dict[Any, int] = {}
    waiting = enumerate(arguments)
    done = 0
    report(done, total, what)
    try:
        while done < total:
            running.update((task.remote(*one), place) for place, one in islice(waiting, WINDOW - len(running)))
            for ended in ray.wait(list(running))[0]:
                place = running.pop(ended)
                results[place] = ray.get(ended)
                done += 1
            report(done, total, what)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(f"packing: Ray lost a task ({reason}); look at Ray's logs, then pack again") from None
    finally:
        for one in running:
            ray.cancel(one)
    return results
