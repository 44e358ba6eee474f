"""What a pod does when it is told to go: it says so to Ray, and stays until its ranks have saved.

python -m pipeline.workers.leaving --deadline 22 --wait 18      the hook of a worker's pod (kube/jobs/rayjob)

Kubernetes tells only the first process of a container to end, which is a shell that tells nobody. A run that hears from
Ray that a node will be taken away saves at once, and goes on without it, if `cluster.min_workers` lets it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

from pipeline.errors import ClusterError

TOLD = "the pod is told to go"


def own_node(client: GcsClient) -> str:
    """The id, in hex, of the node that this pod is: a pod has a name of its own. The head, with its driver, stays.

    Raises:
        ClusterError: Ray knows none that is alive.
    """
    host = socket.gethostname()
    for node, info in client.get_all_node_info(timeout=10).items():
        alive = info.state == GcsNodeInfo.GcsNodeState.ALIVE
        if alive and info.node_manager_hostname == host and not info.is_head_node:
            return str(node.hex())
    raise ClusterError(f"no node of the Ray cluster is {host}; it is gone, or has not joined yet")


def leave(address: str, deadline_s: float) -> None:
    """Tell Ray that this node will be taken away.

    Args:
        address: host:port of the cluster's head.
        deadline_s: seconds that are left to it.

    Raises:
        ClusterError: Ray does not know this node, or will not hear of it.
    """
    client = GcsClient(address=address)
    by_ms = time.time_ns() // 1_000_000 + int(deadline_s * 1000)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    taken, why = client.drain_node(own_node(client), reason, TOLD, by_ms)
    if not taken:
        raise ClusterError(f"Ray does not let this node go: {why}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell, then wait: the pod's processes are ended when this returns."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.workers.leaving", description=__doc__)
    parser.add_argument("--deadline", type=float, required=True, help="seconds until the node is gone")
    parser.add_argument("--wait", type=float, required=True, help="seconds that its ranks are given to save")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.wait
    try:
        leave(os.environ["RAY_ADDRESS"], options.deadline)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    time.sleep(max(0.0, until - time.monotonic()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
