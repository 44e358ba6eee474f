"""How a job ends, by real signals to this process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipeline.errors import ConfigError, PromotionRefusedError, StoppedError
from pipeline.job import exit_code
from pipeline.termination import on_sigterm


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # the handler ends it


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("no such key"), 2, "error: no such key\n"),
        (PromotionRefusedError("a gate"), 3, "error: a gate\n"),
        (StoppedError("v1: no nodes"), 75, "stopped: v1: no nodes; again\n"),
        (KeyboardInterrupt(), 130, "interrupted; again\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_end_has_its_code_and_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert exit_code(lambda: raises(error), "again") == code
    assert told(capsys) == line


def test_sigterm_means_that_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(terminate, "again") == 75
    assert told(capsys) == "terminated; again\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert exit_code(lambda: None) == 0


def test_inner_handler_has_the_signal_for_its_time() -> None:
    seen: list[str] = []
    with on_sigterm(lambda: seen.append("outer")):
        with on_sigterm(lambda: seen.append("inner")):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == ["inner", "outer"]


def interrupted_inside_a_library() -> None:
    try:
        terminate()
    except KeyboardInterrupt:
        raise RecursionError("half imported") from None


def test_what_a_library_makes_of_the_interruption_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(interrupted_inside_a_library, "again") == 75
    assert told(capsys) == "terminated; again\n"
    with pytest.raises(RecursionError):
        exit_code(lambda: raises(RecursionError("a fault of ours")))
