"""The line by which a worker's pod takes leave, as the manifest has it: Ray hears it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import private_ray
from tests.e2e.nodes import ask, until_a_node_is_up
from tests.kube.manifests import ROOT, overlays, ray_clusters, rendered

GOING = (
    "import json, sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False);"
    "print(json.dumps(ray._private.state.state.get_draining_nodes()))"
)


@pytest.mark.timeout(300)
def test_a_pod_that_is_told_to_go_says_so_to_ray(tmp_path: Path) -> None:
    [(_, cluster)] = ray_clusters(rendered(overlays()["spot"] / "train"))
    [container] = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    python, *line = container["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python"
    line[line.index("--wait") + 1] = "0"  # nothing is in training here
    with private_ray(tmp_path) as ray:
        until_a_node_is_up(ray)
        environment = {**ray.environment, "RAY_ADDRESS": ray.gcs, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *line], check=False, env=environment, cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        answer = ask(ray, GOING)
        assert len(json.loads(answer.stdout)) == 1, answer.stderr
