"""What a person sees while a run goes on: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import logs
from pipeline.progress import Lines, asked

LOG_EVERY_S = 15.0

# soft_wrap: a log keeps its lines whole, however narrow rich thinks it is
console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of progress."""
    if logs.is_json():
        print(logs.line("INFO", logs.OURS, text), flush=True)
    else:
        console.print(text, markup=False)  # an error told in it may hold brackets


def show(table: RenderableType) -> None:
    """Print what only people read; files hold the same for machines."""
    if not logs.is_json():
        console.print(table)


Show = Callable[[int, str], None]  # takes the count done and a few words


@contextmanager
def bar(name: str, total: int, unit: str) -> Iterator[Show]:
    """Show how far something is; to whoever has submitted this job, if they asked for that."""
    if asked():
        yield Lines(name, total, unit)
        return
    if logs.is_json() or not console.is_terminal:
        yield _LogLines(name, total, unit)
        return
    columns = (
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, words="")
        yield lambda done, words: progress.update(task, completed=done, words=words)


class _LogLines:
    """A line every LOG_EVERY_S seconds, and one at the end."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.began = self.told = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, words: str) -> None:
        now = time.monotonic()
        if not done:
            self.first = None  # workers are up, perhaps not the first ones
        elif self.first is None:
            self.first, self.began = done, now  # a resumed run does not start at nought
        if done < self.total and now - self.told < LOG_EVERY_S:
            return
        self.told = now
        covered = done - (self.first or 0)
        left = (now - self.began) / covered * (self.total - done) if covered else 0.0
        say(f"{self.name:<12} {done}/{self.total} {self.unit}  {left:.0f} s left  {words}")


def training_words(metrics: dict[str, float]) -> str:
    """`1,234 samples/s  loss v2 3.21  v1 0.98`: the new head's loss first, then the parents'."""
    if not metrics:
        return "workers are up"
    losses = [f"{key.removeprefix('loss/')} {value:.3f}" for key, value in metrics.items() if key.startswith("loss/")]
    return f"{metrics['samples_per_s']:,.0f} samples/s  loss {'  '.join(losses)}"
