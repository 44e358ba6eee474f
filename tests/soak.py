"""Kills a quickstart run again and again, at random moments, and compares what it ends with to a run that never died.

python -m tests.soak --kills 100 --home FOLDER --json docs/benchmarks/soak.json

A kill is SIGKILL of a worker or of the driver, or SIGTERM of one of them, at a random moment from when a group of
workers is there: while it starts, in a step, while a checkpoint is written, while a generation is sealed or registered.
A driver that has ended is started again by the same command, as whoever operates it would. After the kills the run is
left in peace, and every file of its generations must be that of the uninterrupted run, byte for byte; MLflow must have
each step of each metric once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient

from pipeline.code import code_version
from tests.e2e.cluster import PrivateRay, private_ray, processes

ROOT = Path(__file__).parents[1]
KINDS = {"kill worker": 6, "terminate worker": 2, "kill driver": 3, "terminate driver": 1}  # and how often
LONGEST_S = 12.0  # from when there are workers to the kill; they take about half of it to begin with a step
RESUME_ME = 75
EVERY = 10  # steps between checkpoints


@dataclass
class Run:
    """A quickstart run, by the same command each time."""

    ray: PrivateRay
    home: Path
    name: str
    config: Path
    steps: Sequence[str]
    codes: Counter[int] = field(default_factory=Counter)  # with which its drivers have ended
    process: subprocess.Popen[bytes] | None = None

    def ended(self) -> bool:
        """Whether it is done; a driver that died, or that asks to be resumed, is started again.

        Raises:
            AssertionError: it ended with an error.
        """
        if self.process is not None and (code := self.process.poll()) is not None:
            self.codes[code] += 1
            # SIGTERM before Python, or Ray, has set what heeds it ends a process as it always does.
            assert code in (0, RESUME_ME, -signal.SIGKILL, -signal.SIGTERM), (
                self.home / f"{self.name}.log"
            ).read_text()[-3000:]
            self.process = None
            if code == 0:
                return True
        if self.process is None:
            command = [sys.executable, "jobs/train_bct.py", "--config", str(self.config), f"name={self.name}"]
            environment = {**self.ray.environment, "RAY_ADDRESS": self.ray.gcs}
            with (self.home / f"{self.name}.log").open("a") as log:
                self.process = subprocess.Popen(
                    [*command, *self.steps], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
        return False

    def finish(self) -> None:
        """Wait until it is done."""
        while not self.ended():
            time.sleep(0.2)

    def strike(self, kind: str, chance: random.Random) -> bool:
        """Kill or terminate, if there is whom to."""
        what, whom = kind.split()
        victims = workers(self.ray) if whom == "worker" else [self.process.pid] if self.process else []
        if not victims:
            return False
        with suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL if what == "kill" else signal.SIGTERM)
            return True
        return False

    def files(self) -> dict[str, str]:
        """Sha256 of every file of weights of its generations, by name."""
        folder = self.home / "runs" / self.name / "generations"
        found = sorted(folder.rglob("*.safetensors"))
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Every point of every loss in MLflow, by run and key."""
        client = MlflowClient(f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(self.name)
        assert experiment is not None
        found = {}
        for run in client.search_runs([experiment.experiment_id]):
            for key in run.data.metrics:
                if key.startswith("loss/"):
                    points = client.get_metric_history(run.info.run_id, key)
                    found[f"{run.info.run_name}/{key}"] = sorted((point.step, point.value) for point in points)
        return found


def workers(ray: PrivateRay) -> list[int]:
    """Process ids of Ray's training workers."""
    found = []
    for pid in processes(ray.session):
        with suppress(psutil.Error):
            if " ".join(psutil.Process(pid).cmdline()).startswith("ray::RayTrainWorker"):
                found.append(pid)
    return found


def soak(home: Path, kills: int, seed: int, config: Path) -> dict[str, Any]:
    """Run twice, in peace and with kills; returns what goes into the JSON file."""
    chance, done, struck, seconds = random.Random(seed), 0, Counter[str](), {}
    home.mkdir(parents=True, exist_ok=True)
    generations = yaml.safe_load(config.read_text())["generations"]
    every = [f"generations.{name}.training.checkpoints.every={EVERY}" for name in generations]
    with private_ray(home) as ray:
        peace = Run(ray, home, "peace", config, every)
        began = time.monotonic()
        peace.finish()
        seconds["in peace"] = time.monotonic() - began
        run = Run(ray, home, "soak", config, [*every, "cluster.max_failures=1000"])
        began = time.monotonic()
        while done < kills:
            wait_s, seen_at = chance.uniform(0, LONGEST_S), None
            while seen_at is None or time.monotonic() < seen_at + wait_s:
                assert not run.ended(), f"done after {done} kills: give the run more steps"
                if seen_at is None and workers(ray):
                    seen_at = time.monotonic()
                time.sleep(0.05)
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            if run.strike(kind, chance):
                done += 1
                struck[kind] += 1
                print(f"{done:>4}/{kills}  {kind}", flush=True)
        run.finish()
        seconds["with kills"] = time.monotonic() - began
    weights, curves = (peace.files(), run.files()), (peace.metrics(), run.metrics())
    return {
        "benchmark": "soak",
        "kills": done,
        "kinds": dict(struck),
        "drivers_ended_with": {str(code): count for code, count in sorted(run.codes.items())},
        "files_compared": len(weights[0]),
        "files_differing": sorted(name for name, digest in weights[0].items() if weights[1].get(name) != digest),
        "curves_compared": len(curves[0]),
        "curves_differing": sorted(key for key, points in curves[0].items() if curves[1].get(key) != points),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "code": code_version(),
        "command": " ".join(["python", "-m", "tests.soak", *sys.argv[1:]]),
    }


def main() -> int:
    """Soak, and tell; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, required=True, help="a new folder for data, runs and logs")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    result = soak(arguments.home.absolute(), arguments.kills, arguments.seed, arguments.config)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["files_differing"] or result["curves_differing"] or not result["files_compared"] else 0


if __name__ == "__main__":
    sys.exit(main())
