"""A private Ray cluster in a session of its own: own ports, own temporary folder, ended by its processes' ids."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
START_S = 90


@dataclass(frozen=True)
class PrivateRay:
    """Where it answers, and the environment in which commands find it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]
    session: int
    folder: Path

    @property
    def targets(self) -> Path:
        """Where Ray writes whom Prometheus may ask."""
        return self.folder / "t" / "prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Node:
    """A further node of a private Ray, in a session of its own too."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """All of its processes at once, as if its machine were gone."""
        end_session(self.process.pid)
        self.process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def private_ray(home: Path, cpus: int = 2, **variables: str) -> Iterator[PrivateRay]:
    """Start a head node; `home` is the BCT_HOME of everything that it runs, `variables` are set for it."""
    gcs, dashboard, client, *agents = free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray puts sockets in it
    environment = {
        **os.environ,
        "BCT_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **variables,
    }
    environment.pop("RAY_ADDRESS", None)
    (folder / "token").write_text("0123456789abcdef" * 4)
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder / 't'}", "--dashboard-host=127.0.0.1"]
    command += _small(agents, cpus)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _wait(url, process, folder / "log")
        yield PrivateRay(f"127.0.0.1:{gcs}", url, environment, process.pid, folder)
    finally:
        end_session(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def further_node(ray: PrivateRay, cpus: int = 1) -> Iterator[Node]:
    """Start another node on this machine; it joins within seconds, if it is not killed before."""
    command = [str(BIN / "ray"), "start", "--block", f"--address={ray.gcs}", *_small(free_ports(4), cpus)]
    quiet = subprocess.DEVNULL
    node = Node(subprocess.Popen(command, env=ray.environment, stdout=quiet, stderr=quiet, start_new_session=True))
    try:
        yield node
    finally:
        node.kill()


def _small(agents: list[int], cpus: int) -> list[str]:
    """Options of a node. The agents' default ports may be another Ray's of another test."""
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    ports = [f"--{name}={port}" for name, port in zip(names, agents, strict=True)]
    return [*ports, f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]


def processes(session: int) -> Iterator[int]:
    """Ids of a session's processes: Ray's workers have groups of their own, but no sessions."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session:
                yield pid


def end_session(session: int) -> None:
    """Kill every process of a session: Ray's own survive a SIGTERM."""
    for pid in processes(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `ray start` has done all, and the dashboard answers, which comes first or last."""
    for _ in range(START_S * 2):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
            answers = True
        except urllib.error.HTTPError:
            answers = True  # it asks for the token: it is up
        except OSError:
            answers = False
        if answers and "Ray runtime started" in log.read_text():
            return
        time.sleep(0.5)
    raise AssertionError(f"Ray did not start:\n{log.read_text()}")
