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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from tests.e2e.network import Host

BIN = Path(sys.executable).parent
START_S = 90
STARTS = 5
HERE = Host()
NO_SETTINGS: Mapping[str, str] = MappingProxyType({})
# Ids of the nodes that are up.
IDS = """
import sys
from ray._raylet import GcsClient
print(*(key.hex() for key, node in GcsClient(address=sys.argv[1]).get_all_node_info().items() if node.state == 0))
"""
# Whether a dashboard answers, told from where it is: with its demand for a token, too.
ANSWERS = """
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2).close()
except urllib.error.HTTPError:
    pass
except OSError:
    sys.exit(1)
"""


@dataclass(frozen=True)
class PrivateRay:
    """Where it answers, and the environment in which commands find it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]
    session: int
    folder: Path
    host: Host = HERE

    @property
    def targets(self) -> Path:
        """Where Ray writes whom Prometheus may ask."""
        return self.folder / "t" / "prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Node:
    """A further node of a private Ray, in a session of its own too."""

    process: subprocess.Popen[bytes]
    host: Host = HERE

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
def private_ray(
    home: Path, cpus: int = 2, host: Host = HERE, settings: Mapping[str, str] = NO_SETTINGS
) -> Iterator[PrivateRay]:
    """Start a head node.

    Args:
        home: the BCT_HOME of everything that it runs.
        cpus: that Ray may give away there.
        host: where it runs.
        settings: further variables of the environment.
    """
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
        **settings,
    }
    environment.pop("RAY_ADDRESS", None)
    (folder / "token").write_text("0123456789abcdef" * 4)
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder / 't'}", f"--dashboard-host={host.address}"]
    command = host.command([*command, *_small(agents, cpus, host)])
    url, address = f"http://{host.address}:{dashboard}", f"{host.address}:{gcs}"
    process = _started(command, environment, folder / "log")
    try:
        ray = PrivateRay(address, url, environment, process.pid, folder, host)
        _wait_for_dashboard(ray)
        yield ray
    finally:
        end_session(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def further_node(ray: PrivateRay, cpus: int = 1, host: Host = HERE) -> Iterator[Node]:
    """Start another node, which has joined when this is entered."""
    command = [str(BIN / "ray"), "start", "--block", f"--address={ray.gcs}", *_small(free_ports(4), cpus, host)]
    with tempfile.NamedTemporaryFile("r") as log:
        node = Node(_started(host.command(command), ray.environment, Path(log.name)), host)
        try:
            yield node
        finally:
            node.kill()


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A node's process, in a session of its own, once it says that all of the node is up.

    A node gives up if one of its parts takes more than 15 seconds, as they do on a busy machine: it is tried again.
    """
    for _ in range(STARTS):
        with log.open("wb") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        end = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < end:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.2)
        end_session(process.pid)
        process.wait()
    raise AssertionError(f"Ray did not start:\n{log.read_text()}")


def node_ids(ray: PrivateRay) -> set[str]:
    """Ids of the nodes that are up; none where Ray does not answer."""
    command = ray.host.command([sys.executable, "-c", IDS, ray.gcs])
    return set(
        subprocess.run(command, check=False, env=ray.environment, text=True, stdout=subprocess.PIPE).stdout.split()
    )


def _small(agents: list[int], cpus: int, host: Host) -> list[str]:
    """Options of a node. The agents' default ports may be another Ray's of another test."""
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    ports = [f"--{name}={port}" for name, port in zip(names, agents, strict=True)]
    return [*ports, f"--num-cpus={cpus}", f"--node-ip-address={host.address}", "--object-store-memory=100000000"]


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


def _wait_for_dashboard(ray: PrivateRay) -> None:
    look = ray.host.command([sys.executable, "-c", ANSWERS, f"{ray.dashboard}/api/version"])
    end = time.monotonic() + START_S
    while subprocess.run(look, check=False, capture_output=True).returncode != 0:
        assert time.monotonic() < end, "the dashboard did not start"
        time.sleep(0.5)
