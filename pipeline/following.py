"""A job on a cluster, seen from where it was submitted: its output as it comes, its progress as bars, its exit code."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any, Self

from pipeline.console import Show, bar, say
from pipeline.errors import ClusterError
from pipeline.progress import parsed
from pipeline.redaction import in_short
from pipeline.submission import FAILURES, Attempt, Submitter

PATIENCE_S = 60.0  # without an answer of the cluster, before the job is left to itself
LOOK_S = 1.0


class Screen:
    """Shows a job's lines here: those of progress as bars, all others as they are."""

    def __init__(self) -> None:
        self.bars = ExitStack()
        self.shown: tuple[str, int] | None = None
        self.show: Show | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.close()

    def line(self, text: str) -> None:
        """Take one line."""
        far = parsed(text)
        if far is None:
            say(text)
            return
        if self.show is None or (far.name, far.total) != self.shown:
            self.bars.close()
            self.shown = far.name, far.total
            self.show = self.bars.enter_context(bar(far.name, far.total, far.unit))
        self.show(far.done, far.words)


def follow(submitter: Submitter, attempt: Attempt) -> Attempt:
    """Show an attempt's output from its first line until it has ended, and return how it did.

    Where the connection is lost it is made again, and goes on with the next line.

    Raises:
        ClusterError: the cluster does not answer any more; the job may go on.
    """
    seen, answered = 0, time.monotonic()
    with Screen() as screen:
        while True:
            try:
                seen = asyncio.run(_show(submitter.client, attempt.id, screen, seen))
                now = submitter.look(attempt)
                answered = time.monotonic()
                if now.ended:
                    return now
            except (ClusterError, *FAILURES) as error:
                if time.monotonic() - answered > PATIENCE_S:
                    raise ClusterError(
                        f"the cluster does not answer ({in_short(error)}); {attempt.id} may go on: the same command "
                        "follows it again"
                    ) from None
            time.sleep(LOOK_S)


async def _show(client: Any, submission: str, screen: Screen, seen: int) -> int:
    """Show the lines after the first `seen` ones, until the log ends or the connection; how many there were."""
    number, rest = 0, ""
    try:
        async for chunk in client.tail_job_logs(submission):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                number += 1
                if number > seen:
                    screen.line(line.rstrip("\r"))
    except FAILURES:
        if number <= seen:
            raise
        return number
    if rest and number >= seen:
        screen.line(rest)
    return max(number, seen)
