"""A document whose commands are run as they stand there, and whose printed output is compared with what they print.

    ```console
    $ python jobs/promote.py --generation v2
    v2 serves
    ```

A line `[exit code 3]` says that the command fails. `python -m tests.e2e.walkthrough docs/upgrade.md HOME` runs a
document at a home where the quickstart has been trained, and writes what the commands print into it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.servers import postgres

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"\[exit code (\d+)\]")
BAR = re.compile(r"(\S+) .* \d+ s left ")


@dataclass(frozen=True)
class Step:
    """A command, as it stands in the document, and the lines below it."""

    command: str
    lines: tuple[str, ...]


def steps_of(block: str) -> list[Step]:
    """The commands of a block; a backslash at the end goes on in the next line."""
    steps: list[Step] = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.replace("\\\n", "\\\0").splitlines()
        steps.append(Step(lines[0].replace("\\\0", "\\\n"), tuple(lines[1:])))
    return steps


def steps_in(document: Path) -> list[Step]:
    """The commands of all blocks of a document."""
    return [step for block in BLOCK.findall(document.read_text()) for step in steps_of(block)]


def masked(line: str) -> str:
    """A line without what differs from run to run: numbers, digests, and how columns are filled."""
    line = re.sub(r"\b[0-9a-f]{12}\b", "#", line)
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "#", line).split())


def run(step: Step, home: Path, environment: Mapping[str, str], instead: Mapping[str, str]) -> list[str]:
    """Run a command at a home, and return what it prints, as a document shows it.

    Args:
        step: whose command it is.
        home: where data and runs are; the document's paths start there.
        environment: of the command.
        instead: words of the command that are replaced, such as the name of the config.
    """
    command = step.command.replace("\\\n", " ")
    for word, other in instead.items():
        command = command.replace(word, other)
    command = re.sub(r"(?<!\S)((?:jobs|configs|docs/examples)/)", rf"{ROOT}/\1", command)
    command = re.sub(r"(?<!\S)python(?!\S)", sys.executable, command)
    done = subprocess.run(
        command,
        shell=True,
        check=False,
        cwd=home,
        env=dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
    )
    lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    bars = [found and found[1] for found in map(BAR.match, lines)]
    kept = [
        line for line, one, following in zip(lines, bars, [*bars[1:], None], strict=True) if not one or one != following
    ]
    return kept + ([f"[exit code {done.returncode}]"] if done.returncode else [])


def differing(step: Step, printed: list[str]) -> str | None:
    """The first line of the document that was not printed, in order, or another exit code."""
    left = iter(map(masked, printed))
    for line in step.lines:
        if masked(line) not in left:
            return line
    codes = [[line for line in lines if CODE.fullmatch(line)] for lines in (step.lines, printed)]
    return None if codes[0] == codes[1] else f"exit code {codes}"


def rewritten(text: str, home: Path, environment: Mapping[str, str]) -> str:
    """The document with what its commands print at a home."""

    def blocks() -> Iterator[str]:
        for block in BLOCK.finditer(text):
            told = []
            for step in steps_of(block[0]):
                print(f"$ {step.command}", file=sys.stderr)
                told += [f"$ {step.command}", *run(step, home, environment, {})]
            yield "\n".join(told) + "\n"

    found = blocks()
    return BLOCK.sub(lambda _: next(found), text)


if __name__ == "__main__":
    document, at = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
    with postgres() as database:
        names = {"BCT_HOME": str(at), "DATABASE_URL": database.uri, "PYTHONPATH": str(ROOT)}
        document.write_text(rewritten(document.read_text(), at, {**os.environ, **names}))
