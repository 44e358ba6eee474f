"""The line by which a worker's pod takes leave, as the manifest has it: Ray hears it, of that node alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.workers.leaving import TOLD
from tests.e2e.cluster import PrivateRay, further_node, private_ray
from tests.e2e.servers import eventually
from tests.kube.manifests import ROOT, overlays, ray_clusters, rendered

# A node that has nothing to do goes at once when Ray hears that it will be taken away, and says why.
NODES = """
import sys
from ray._raylet import GcsClient
for node in GcsClient(address=sys.argv[1]).get_all_node_info().values():
    print("head" if node.is_head_node else "worker", "up" if node.state == 0 else node.death_info.reason_message)
"""


@pytest.mark.timeout(300)
def test_a_pod_that_is_told_to_go_says_so_to_ray(tmp_path: Path) -> None:
    [(_, cluster)] = ray_clusters(rendered(overlays()["spot"] / "train"))
    [container] = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    python, *line = container["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python"
    line[line.index("--wait") + 1] = "0"  # nothing is in training here
    with private_ray(tmp_path) as ray, further_node(ray):
        given = {**ray.environment, "RAY_ADDRESS": ray.gcs, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *line], check=True, env=given, cwd=ROOT)
        gone = {"head up", f"worker {TOLD}"}
        eventually(lambda: set(nodes_of(ray)) == gone, lambda: str(nodes_of(ray)))


def nodes_of(ray: PrivateRay) -> list[str]:
    command = [sys.executable, "-c", NODES, ray.gcs]
    return subprocess.run(command, check=False, env=ray.environment, capture_output=True, text=True).stdout.splitlines()
