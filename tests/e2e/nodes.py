"""Waiting for a private Ray's node: its dashboard answers before there is one that a job could join."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e.cluster import PrivateRay
from tests.e2e.servers import eventually

KNOWN = (
    "import sys; from ray._raylet import GcsClient;"
    "sys.exit(len(GcsClient(address=sys.argv[1]).get_all_node_info()) < int(sys.argv[2]))"
)


def ask(ray: PrivateRay, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python that is given the cluster's address, and arguments."""
    command = [sys.executable, "-c", code, ray.gcs, *arguments]
    return subprocess.run(command, check=False, env=ray.environment, capture_output=True, text=True)


def until_nodes_are_up(ray: PrivateRay, count: int = 1) -> None:
    """Return when so many are known, the head among them."""
    eventually(lambda: ask(ray, KNOWN, str(count)).returncode == 0)
