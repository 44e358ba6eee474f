"""The Ray that the product starts by itself, real: who has no token is turned away, nothing listens beyond loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

SECRET = "planted-7c1d"
SCRIPT = """
import json, os, sys
os.environ.pop("RAY_AUTH_MODE", None)
import ray
from pipeline import cluster
cluster.connect()
told = ray.get(ray.remote(lambda: dict(ray.get_runtime_context().runtime_env)).remote())
print(json.dumps({"dashboard": cluster.dashboard(), "runtime_env": told}), flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(200)
def test_a_ray_of_our_own_asks_for_a_token_listens_on_loopback_and_logs_no_secret() -> None:
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
        assert told["dashboard"].startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{told['dashboard']}/api/jobs/", timeout=20)
        assert error.value.code == 401
        error.value.close()
        assert SECRET not in json.dumps(told)
        port = int(told["dashboard"].rpartition(":")[2])
        listening = [one.laddr for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr]
        assert {one.ip for one in listening if one.port == port} == {"127.0.0.1"}
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert any(path.suffix == ".log" for path in files)
        assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
