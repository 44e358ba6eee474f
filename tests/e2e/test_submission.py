"""Jobs submitted to a Ray cluster from another folder, a laptop's: what travels, who may, how they end and go on."""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline.progress import PREFIX
from pipeline.workers.foreman import POLL_S
from tests.e2e.cluster import BIN, PrivateRay, private_ray
from tests.e2e.relay import relay
from tests.e2e.training import CONFIG, Training, workers_of, write_images
from tests.e2e.walkthrough import differing, steps_in

ROOT = Path(__file__).parents[2]
PATIENCE_S = 480
STEPS, EVERY = 2000, 50  # enough that a run is stopped before its end, however fast the machine
RAYS_STYLE = re.compile(r"\x1b\[\d+m|^\S+ \S+\s+(?:INFO|SUCC) \S+ -- ")  # colours, and where in its code
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
LOOK = """
import json, os, pathlib
files = sorted(str(path) for path in pathlib.Path().rglob("*") if path.is_file())
print("SEEN", json.dumps({"files": files, "home": os.environ.get("BCT_HOME"), "here": os.getcwd()}))
"""

COUNT = """
import time
for number in range(120):
    print("COUNTED", number, flush=True)
    time.sleep(0.1)
"""


@dataclass
class Laptop:
    """A checkout, and the environment of who works in it."""

    folder: Path
    ray: PrivateRay
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**self.ray.environment, "RAY_ADDRESS": self.ray.dashboard, "PYTHONPATH": str(self.folder)}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command there; `python` and `ray` are those of the tests."""
        program = {"python": sys.executable, "ray": str(BIN / "ray")}[command[0]]
        environment = {**self.environment, **variables}
        for _ in range(30):
            done = subprocess.run(
                [program, *command[1:]],
                check=False,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            if "No available agent" not in done.stderr:  # the dashboard answers before the agent that runs jobs is up
                break
            time.sleep(1)
        return done

    def submit(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "jobs/submit.py", *words, **variables)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    folder, home = tmp_path_factory.mktemp("laptop"), tmp_path_factory.mktemp("home")
    for name in ("jobs", "pipeline", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    mine = copy.deepcopy({**CONFIG, "name": "mine"})
    mine["generations"]["v1"]["training"] |= {"steps": STEPS, "checkpoints": {"every": EVERY}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(mine))
    (folder / "look.py").write_text(LOOK)
    (folder / "count.py").write_text(COUNT)
    for left in (
        "data/train/shard.tar",
        "runs/old/report.json",
        ".venv/bin/python",
        ".git/HEAD",
        "jobs/__pycache__/a.pyc",
    ):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("stays")
    write_images(home)
    with private_ray(home) as ray:
        yield Laptop(folder, ray, home)


def test_what_travels_with_a_job_and_what_does_not(laptop: Laptop) -> None:
    environment = json.dumps({"env_vars": {"BCT_HOME": "/shared/home"}})
    done = laptop.run(
        "ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", environment, "--", "python", "look.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    seen = json.loads(line.removeprefix("SEEN "))
    files = set(seen["files"])
    assert {"jobs/train_bct.py", "pipeline/run.py", "configs/tiny.yaml", "mine.yaml", "look.py"} <= files
    assert not [name for name in files if name.startswith(("data/", "runs/", ".venv/", ".git/"))]
    assert not [name for name in files if "__pycache__/a.pyc" in name]
    assert seen["home"] == "/shared/home"
    assert seen["here"] != str(laptop.folder)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64, "RAY_AUTH_TOKEN_PATH": ""}, "the cluster wants its token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "the cluster wants its token"),
        ({"RAY_ADDRESS": "http://127.0.0.1:1"}, "the cluster's dashboard cannot be asked"),
    ],
    ids=["wrong", "missing", "nobody"],
)
def test_who_may_not_submit_is_told_in_one_line(laptop: Laptop, variables: dict[str, str], told: str) -> None:
    done = laptop.submit("jobs/train_bct.py", "--config", "mine.yaml", **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {told}"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/somewhere/jobs/train_bct.py"], "is no file of this folder"),
        (["jobs/train_bct.py", "--config", "none.yaml"], "none.yaml"),
        (["--env", "HOME", "jobs/train_bct.py"], "--env HOME is not KEY=VALUE"),
        (["--stop", "jobs/evaluate.py"], "no attempt of evaluate runs"),
    ],
)
def test_mistakes_are_told_before_anything_travels(laptop: Laptop, words: list[str], told: str) -> None:
    done = laptop.submit(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr.splitlines()[-1], done.stderr


def test_the_exit_code_is_the_jobs_own(laptop: Laptop) -> None:
    words = ("jobs/train_bct.py", "--config", "mine.yaml", "name=wrong", "generations.v1.training.nonsense=1")
    done = laptop.submit(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nonsense" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrong-1: failed, exit code 2"


@contextmanager
def held(ray: PrivateRay) -> Iterator[None]:
    """No step is done meanwhile."""
    workers = workers_of(ray.session)
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


class Terminal:
    """A submitter's terminal, and all that is written to it."""

    def __init__(self, laptop: Laptop, *words: str, **variables: str) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "jobs/submit.py", *words]
        environment = {**laptop.environment, "TERM": "xterm", "COLUMNS": "120", **variables}
        self.process = subprocess.Popen(command, cwd=laptop.folder, env=environment, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.shown, self.end = "", ours
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self.end, 1 << 16):
                self.shown += chunk.decode(errors="replace")
        except OSError:  # nobody writes any more
            return

    def code(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self.reader.join()
        return code


@pytest.mark.long
def test_a_lost_connection_is_made_again_and_no_line_is_lost_or_shown_twice(laptop: Laptop) -> None:
    with relay(laptop.ray.dashboard) as wire:
        follows = Terminal(laptop, "count.py", RAY_ADDRESS=wire.url)
        end = time.monotonic() + PATIENCE_S
        while "COUNTED 20" not in follows.shown:
            assert follows.process.poll() is None, follows.shown
            assert time.monotonic() < end, follows.shown
            time.sleep(0.05)
        wire.cut()
        time.sleep(3)  # the job counts on
        assert "COUNTED 119" not in follows.shown
        wire.mend()
        assert follows.code() == 0, follows.shown
    counted = [int(number) for number in re.findall(r"COUNTED (\d+)", follows.shown)]
    assert counted == list(range(120))
    assert "count-1: succeeded, exit code 0" in follows.shown


@pytest.mark.long
def test_a_stopped_job_saves_and_the_same_command_goes_on(laptop: Laptop) -> None:
    training, command = Training(laptop.ray, laptop.home, "mine"), ("jobs/train_bct.py", "--config", "mine.yaml")
    first = Terminal(laptop, *command)
    end = time.monotonic() + PATIENCE_S
    while training.saved() < EVERY:
        assert first.process.poll() is None, first.shown
        assert time.monotonic() < end, first.shown
        time.sleep(0.2)

    with held(laptop.ray):
        other = laptop.submit(*command, "generations.v1.seed=7")
        assert other.returncode == 2
        assert "mine-1 is the name of another command" in other.stderr
        follows = laptop.submit("--detach", *command)
        assert follows.returncode == 0
        assert "mine-1 runs already" in follows.stdout
        status = laptop.run("ray", "job", "status", "mine-1")
        assert "RUNNING" in status.stdout + status.stderr
        stops = Terminal(laptop, "--stop", *command)
        while "mine-1 is told to stop" not in stops.shown:
            assert stops.process.poll() is None, stops.shown
            time.sleep(0.2)
        time.sleep(10 * POLL_S)  # until the driver has asked the workers to save
    assert stops.code() == 0, stops.shown
    assert "mine-1: stopped, exit code 75" in stops.shown
    assert "told to end (SIGTERM); the workers stopped after a checkpoint" in stops.shown
    assert first.code() == 75
    assert "━" in first.shown, "a bar"
    assert PREFIX not in first.shown
    saved = training.saved()
    assert EVERY <= saved < STEPS
    logs = laptop.run("ray", "job", "logs", "mine-1")
    assert "told to end (SIGTERM)" in logs.stdout

    again = laptop.submit(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "mine-2 is submitted, after mine-1 (stopped)" in again.stdout
    assert f"/{STEPS} steps" in again.stdout, "lines, where there is no terminal"
    assert PREFIX not in again.stdout
    assert again.stdout.splitlines()[-1] == "mine-2: succeeded, exit code 0"
    assert training.run().info.status == "FINISHED"
    assert set(training.losses()) == set(range(2, STEPS + 1, 2)), "each step once, by two attempts"


@pytest.mark.long
def test_the_documents_commands_print_what_stands_there(laptop: Laptop) -> None:
    environment = {**laptop.environment, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for step in steps_in(ROOT / "docs" / "jobs.md"):
        command = step.command.replace("mine", "walk").replace("walk.yaml", "mine.yaml name=walk")
        done = subprocess.run(
            ["bash", "-c", command],
            check=False,
            cwd=laptop.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        printed = [RAYS_STYLE.sub("", line) for line in done.stdout.replace("walk", "mine").splitlines()]
        assert differing(step, printed) is None, f"{step.command}\n{done.stdout}"
