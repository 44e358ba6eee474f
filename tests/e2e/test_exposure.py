"""The Ray that the product starts by itself, real: who has no token is turned away, and no secret is in its logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.e2e.cluster import BIN

SECRET = "planted-7c1d"
SCRIPT = """
import json, os, sys
os.environ.pop("RAY_AUTH_MODE", None)
import ray
from pipeline import cluster
cluster.connect()
told = {"runtime_env": ray.get(ray.remote(lambda: dict(ray.get_runtime_context().runtime_env)).remote())}
told["gcs"] = ray.get_runtime_context().gcs_address
told["dashboard"] = cluster.dashboard()
print(json.dumps(told), flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(200)
def test_a_ray_of_our_own_asks_for_a_token_has_no_dashboard_and_logs_no_secret() -> None:
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray puts sockets in it
    planted = {"AWS_SECRET_ACCESS_KEY": f"{SECRET}-aws", "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9"}
    environment = {**os.environ, **planted, "RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN": f"{SECRET}-ray-{'0' * 32}"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert SECRET not in json.dumps(told)
        assert not told["dashboard"]
        running = [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)]
        assert [line for line in running if "gcs_server" in line]
        assert not [line for line in running if "dashboard.py" in line and "--disable-frontend" not in line]
        ask = [str(BIN / "ray"), "status", "--address", told["gcs"]]
        with_token = environment | {"RAY_AUTH_MODE": "token"}
        ours = subprocess.run(ask, check=False, env=with_token, capture_output=True, text=True, timeout=60)
        assert ours.returncode == 0, ours.stderr
        stranger = with_token | {"RAY_AUTH_TOKEN": "f" * 32}
        theirs = subprocess.run(ask, check=False, env=stranger, capture_output=True, text=True, timeout=60)
        assert theirs.returncode != 0
        assert "InvalidAuthToken" in theirs.stderr, theirs.stderr
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert any(path.suffix == ".log" for path in files)
        assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
