"""Waiting for a private Ray's node: its dashboard answers before there is one that a job could join."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e.cluster import PrivateRay
from tests.e2e.servers import eventually

KNOWN = (
    "import sys; from ray._raylet import GcsClient; sys.exit(not GcsClient(address=sys.argv[1]).get_all_node_info())"
)


def ask(ray: PrivateRay, code: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python that is given the cluster's address."""
    command = [sys.executable, "-c", code, ray.gcs]
    return subprocess.run(command, check=False, env=ray.environment, capture_output=True, text=True)


def until_a_node_is_up(ray: PrivateRay) -> None:
    """Return when the head's node is known."""
    eventually(lambda: ask(ray, KNOWN).returncode == 0)
