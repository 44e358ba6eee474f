"""How many training processes the cluster's nodes have room for, now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.workers.config import ClusterConfig

ANSWER_S = 60  # a node that is gone is known to be after half of it
Node = dict[str, Any]  # as of ray.nodes()


def nodes() -> list[Node]:
    """Those that Ray believes to be there, and that are not about to go."""
    going = leaving()
    alive: list[Node] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [node for node in alive if node["NodeID"] not in going]


def leaving() -> set[str]:
    """Ids of the nodes of which Ray has been told that they will be taken away (it calls that draining)."""
    told: dict[str, int] = ray._private.state.state.get_draining_nodes()  # there is no public way but in a worker
    return set(told)


def answering(believed: Iterable[Node]) -> list[Node]:
    """Those on which a task runs: Ray believes in a lost node for half a minute, and would wait for it."""
    tasks = {_here.options(scheduling_strategy=_only(node)).remote(): node for node in believed}
    ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_S) if tasks else ([], [])
    return [tasks[task] for task in ended if _ran(task)]


def room(cluster: ClusterConfig, on: Iterable[Node]) -> int:
    """Training processes that fit on nodes, at most `cluster.workers`; what others use there does not count."""
    return min(cluster.workers, sum(places(cluster, node) for node in on))


def places(cluster: ClusterConfig, node: Node) -> int:
    """Training processes that fit on an idle node."""
    return int(min(node["Resources"].get(kind, 0) // amount for kind, amount in cluster.needs.items()))


def free_places(cluster: ClusterConfig) -> int:
    """Training processes for which nobody uses what they need."""
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return int(min(free.get(kind, 0) // amount for kind, amount in cluster.needs.items()))


@ray.remote(num_cpus=0, max_retries=0)
def _here() -> None:
    """Runs where it is put, or fails."""


def _only(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _ran(task: Any) -> bool:
    try:
        ray.get(task)
    except ray.exceptions.RayError:
        return False
    return True
