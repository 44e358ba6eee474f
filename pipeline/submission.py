"""Jobs on a Ray cluster, submitted from elsewhere: one attempt at a time of a name, and the next one goes on.

An attempt's submission id is NAME-NUMBER. Ray tells of a job whether it succeeded; its exit code is kept beside.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.config import load_config
from pipeline.console import say
from pipeline.errors import ClusterError, ConfigError, StoppedError
from pipeline.progress import ASKED
from pipeline.redaction import in_short

# Ray kills what it has told to stop after three seconds: too few for a checkpoint (cluster.preemption_deadline_s).
STOP_S = 60
QUICKSTART = Path("configs/quickstart.yaml")  # what jobs/train_bct.py trains by default
FAILURES = (RuntimeError, OSError, aiohttp.ClientError, requests.RequestException)


@dataclass(frozen=True)
class Attempt:
    """One submission of a command."""

    id: str
    number: int
    command: str
    status: JobStatus
    exit_code: int | None = None
    message: str = ""

    @classmethod
    def of(cls, number: int, job: Any) -> Attempt:
        """From what Ray tells of it."""
        return cls(job.submission_id, number, job.entrypoint, job.status, job.driver_exit_code, job.message or "")

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return bool(self.status.is_terminal())


def entrypoint(words: Sequence[str]) -> str:
    """The command line on the cluster, of a job's file and its arguments.

    Raises:
        ConfigError: the job is not in this folder.
    """
    job = Path(words[0])
    if job.is_absolute() or not job.is_file():
        raise ConfigError(f"{job} is no file of this folder, {Path.cwd()}, which travels: go to the checkout's root")
    return shlex.join(["python", *words])


def name_of(words: Sequence[str]) -> str:
    """A job's name: of its run, if it trains one; RUN-JOB, if it has a run's config; else the job's.

    Raises:
        ConfigError: the config does not hold.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(words[1:])
    job, trains = Path(words[0]).stem, Path(words[0]).name == "train_bct.py"
    if known.config is None and not trains:
        return job
    run = load_config(known.config or QUICKSTART, [word for word in rest if word.startswith("name=")]).name
    return run if trains else f"{run}-{job}"


class Submitter:
    """Attempts of a name on a cluster.

    Args:
        address: of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or the Ray of this machine.
        name: of the run.

    Raises:
        ClusterError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str | None, name: str) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.name = name
        self.client: Any = _told(lambda: JobSubmissionClient(address))

    def attempts(self) -> list[Attempt]:
        """Those that the cluster knows of, the first one first."""
        pattern = re.compile(rf"{re.escape(self.name)}-(\d+)")
        named = [(pattern.fullmatch(job.submission_id or ""), job) for job in _told(self.client.list_jobs)]
        found = [Attempt.of(int(match[1]), job) for match, job in named if match]
        return sorted(found, key=lambda attempt: attempt.number)

    def submit(self, command: str, variables: Mapping[str, str]) -> Attempt:
        """The attempt of a command that runs, or a new one; it goes on where the last one ended.

        Args:
            command: as `entrypoint` gives it.
            variables: of the job's environment.

        Raises:
            ConfigError: the name belongs to another command.
        """
        attempts = self.attempts()
        if attempts and attempts[-1].command != command:
            raise ConfigError(
                f"{attempts[-1].id} is the name of another command, `{attempts[-1].command}`: take another --name"
            )
        if attempts and not attempts[-1].ended:
            say(f"{attempts[-1].id} runs already")
            return attempts[-1]
        number = attempts[-1].number + 1 if attempts else 1
        environment = {ASKED: "lines", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **variables}
        runtime_env = {"working_dir": ".", "env_vars": environment}
        submission = f"{self.name}-{number}"
        _told(lambda: self.client.submit_job(entrypoint=command, submission_id=submission, runtime_env=runtime_env))
        before = f", after {attempts[-1].id} ({attempts[-1].status.value.lower()})" if attempts else ""
        say(f"{submission} is submitted{before}")
        return Attempt(submission, number, command, JobStatus.PENDING)

    def stop(self) -> Attempt:
        """Tell the attempt that runs to end, with SIGTERM: it saves before.

        Raises:
            ConfigError: there is none.
        """
        running = [attempt for attempt in self.attempts() if not attempt.ended]
        if not running:
            raise ConfigError(f"no attempt of {self.name} runs: there is nothing to stop")
        _told(lambda: self.client.stop_job(running[-1].id))
        say(f"{running[-1].id} is told to stop")
        return running[-1]

    def look(self, attempt: Attempt) -> Attempt:
        """The same attempt as it is now."""
        (found,) = [one for one in self.attempts() if one.id == attempt.id]
        return found


def code_of(attempt: Attempt) -> int:
    """The exit code of an attempt that has ended, as if its command had run here.

    One that was stopped goes on by the same command, whether it still could save or not: 75.
    """
    if attempt.exit_code is not None:
        return attempt.exit_code
    return StoppedError.exit_code if attempt.status == JobStatus.STOPPED else 1


def _told(ask: Callable[[], Any]) -> Any:
    """What the cluster answers; where it refuses, or does not, one line."""
    try:
        return ask()
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster wants its token: {in_short(error)}; it is the one in ~/.ray/auth_token where the cluster was "
            "started: set RAY_AUTH_TOKEN, or put it into a file and set RAY_AUTH_TOKEN_PATH"
        ) from None
    except FAILURES as error:
        raise ClusterError(
            f"the cluster's dashboard cannot be asked: {in_short(error)}; set RAY_ADDRESS or --address to its URL, "
            "such as http://127.0.0.1:8265"
        ) from None
