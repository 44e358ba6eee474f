"""Log lines for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from pipeline import logs
from pipeline.console import bar, say
from pipeline.errors import ConfigError, DataError
from pipeline.job import exit_code

SCRIPT = """
import logging, warnings
from pipeline import logs
from pipeline.console import say
from pipeline.job import exit_code
from pipeline.errors import DataError

def work():
    step = 7
    logs.take_place("run", "v2", 3, lambda: step)
    say("half [done] of s3://me:secret@bucket")
    logging.getLogger("pipeline.training.loop").info("of %s", "ours")
    logging.getLogger("other").info("of others")
    logging.getLogger("other").warning("postgresql://me:secret@host/db")
    step = 8
    warnings.warn("as a warning")
    try:
        raise ValueError("https://token@host/set")
    except ValueError:
        logging.getLogger("other").exception("it failed")
    raise DataError("no shards")

raise SystemExit(exit_code(work))
"""


def lines(form: str) -> tuple[int, list[str], list[str]]:
    environment = {**os.environ, "BCT_LOG_FORMAT": form}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_every_line_is_one_object_with_its_place_and_without_secrets() -> None:
    code, out, err = lines("json")
    assert code == 2
    told = [json.loads(line) for line in out + err]
    assert [(one["level"], one["message"].splitlines()[0]) for one in told] == [
        ("INFO", "half [done] of s3://me:***@bucket"),
        ("INFO", "of ours"),
        ("WARNING", "postgresql://me:***@host/db"),
        ("WARNING", "<string>:16: UserWarning: as a warning"),
        ("ERROR", "it failed"),
        ("ERROR", "error: no shards"),
    ]
    assert {(one["run"], one["generation"], one["rank"]) for one in told} == {("run", "v2", 3)}
    assert [one["step"] for one in told] == [7, 7, 7, 8, 8, 8]
    assert "ValueError: https://***@host/set" in told[4]["exception"]
    assert not any("secret" in line for line in out + err)
    assert all(one["time"].endswith("+00:00") for one in told)


def test_lines_for_people_are_as_they_always_were() -> None:
    code, out, err = lines("text")
    assert code == 2
    assert out == ["half [done] of s3://me:secret@bucket"], "say is given what is redacted"
    assert err[0] == "postgresql://me:secret@host/db"
    assert err[-1] == "error: no shards"


@pytest.fixture
def _for_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(logs.VARIABLE, "json")
    yield
    logs.take_place("")


@pytest.mark.usefixtures("_for_machines")
def test_a_bar_becomes_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.take_place("tiny")
    with bar("v1", 2, "steps") as show:
        show(0, "workers are up")
        show(2, "loss [3.2]")
    say("done")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["run"] for one in told] == ["tiny", "tiny"]
    assert "2/2 steps" in told[0]["message"]
    assert "step" not in told[0], "the driver is in none"


def test_another_format_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(ConfigError, match="neither 'json' nor 'text'"):
        logs.configure()
    assert exit_code(lambda: None) == 2
    assert capsys.readouterr().err == "error: BCT_LOG_FORMAT='xml' is neither 'json' nor 'text'\n"


def test_nothing_changes_in_a_process_that_nobody_asked() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert exit_code(lambda: warnings.warn("shown", stacklevel=2)) == 0
    assert [str(one.message) for one in seen] == ["shown"]

    def fail() -> None:
        raise DataError("x")

    assert exit_code(fail) == 2
