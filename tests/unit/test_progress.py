"""Lines that say how far a job is, and what is made of them."""

from __future__ import annotations

import pytest
from ray.job_submission import JobStatus

from pipeline.console import bar
from pipeline.following import Screen
from pipeline.progress import ASKED, PREFIX, Far, parsed
from pipeline.submission import Attempt, code_of, name_of


def test_a_bar_becomes_lines_for_who_asks_and_they_a_bar_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ASKED, "lines")
    with bar("v1", 40, "steps") as show:
        show(20, "loss v1 3.20")
        show(21, "too soon after the one before")
        show(40, "loss [v1] 2.10 \u2028 é")
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert [parsed(line) for line in lines] == [
        Far("v1", 20, 40, "steps", "loss v1 3.20"),
        Far("v1", 40, 40, "steps", "loss [v1] 2.10 \u2028 é"),
    ]
    monkeypatch.delenv(ASKED)
    with Screen() as screen:
        for line in ["train 160 images", *lines, "done [not markup]"]:
            screen.line(line)
    shown = capsys.readouterr().out
    assert shown.startswith("train 160 images\nv1           40/40 steps")
    assert shown.endswith("done [not markup]\n")
    assert PREFIX not in shown


@pytest.mark.parametrize("rest", ["", "{", "[]", "{}", '{"name": 1}', "[" * 10**5, '{"name": "a", "done": "x"}'])
def test_what_only_looks_like_such_a_line_is_shown_as_it_is(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(PREFIX + rest) is None
    with Screen() as screen:
        screen.line(PREFIX + rest)
    assert capsys.readouterr().out == f"{PREFIX}{rest}\n"


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 75, 75),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 75),
    ],
)
def test_the_exit_code_of_an_attempt(status: JobStatus, told: int | None, code: int) -> None:
    assert code_of(Attempt("a-1", 1, "python a.py", status, told)) == code


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("jobs/train_bct.py", "quickstart"),
        ("jobs/train_bct.py --config configs/tiny.yaml", "tiny"),
        ("jobs/train_bct.py --config configs/tiny.yaml name=other generations.v1.seed=1", "other"),
        ("jobs/evaluate.py --config configs/tiny.yaml", "tiny-evaluate"),
        ("jobs/pack.py --source folder", "pack"),
    ],
)
def test_a_job_is_named_by_its_run(words: str, name: str) -> None:
    assert name_of(words.split()) == name
