"""The line by which a worker's pod takes leave, as the manifest has it: Ray hears it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import PrivateRay, private_ray
from tests.e2e.servers import eventually
from tests.kube.manifests import ROOT, overlays, ray_clusters, rendered

KNOWN = (
    "import sys; from ray._raylet import GcsClient; sys.exit(not GcsClient(address=sys.argv[1]).get_all_node_info())"
)
GOING = (
    "import json, sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False);"
    "print(json.dumps(ray._private.state.state.get_draining_nodes()))"
)


def ask(ray: PrivateRay, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, ray.gcs]
    return subprocess.run(command, check=False, env=ray.environment, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_a_pod_that_is_told_to_go_says_so_to_ray(tmp_path: Path) -> None:
    [(_, cluster)] = ray_clusters(rendered(overlays()["spot"] / "train"))
    [container] = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    python, *line = container["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python"
    line[line.index("--wait") + 1] = "0"  # nothing is in training here
    with private_ray(tmp_path) as ray:
        eventually(lambda: ask(ray, KNOWN).returncode == 0)
        environment = {**ray.environment, "RAY_ADDRESS": ray.gcs, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *line], check=False, env=environment, cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        answer = ask(ray, GOING)
        assert len(json.loads(answer.stdout)) == 1, answer.stderr
