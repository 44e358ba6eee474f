"""How many training processes the cluster's nodes have room for, now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    return _room(cluster, [places(cluster, node) for node in on])


def _room(cluster: ClusterConfig, places_N: Sequence[int]) -> int:
    if cluster.placement == "STRICT_PACK":
        return min(cluster.workers, max(places_N, default=0))
    if cluster.placement == "STRICT_SPREAD":
        return min(cluster.workers, sum(1 for number in places_N if number))
    return min(cluster.workers, sum(places_N))


def shortage(cluster: ClusterConfig, on: Sequence[Node]) -> str:
    """What a cluster that is too small has, beside what is asked: one line."""
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in cluster.needs.items())
    there = {kind: [float(node["Resources"].get(kind, 0)) for node in on] for kind in cluster.needs}
    has = ", ".join(
        f"{sum(found):g} {kind} (at most {max(found, default=0):g} on one)" for kind, found in there.items()
    )
    strictly = f" by cluster.placement={cluster.placement}" if cluster.placement.startswith("STRICT") else ""
    nodes = "1 node has" if len(on) == 1 else f"{len(on)} nodes have"
    return (
        f"{cluster.fewest} workers of {each} are needed, but the Ray cluster's {nodes} {has}: room for "
        f"{room(cluster, on)}{strictly}"
    )


def places(cluster: ClusterConfig, node: Node) -> int:
    """Training processes that fit on an idle node."""
    return _places(cluster, node["Resources"])


def _places(cluster: ClusterConfig, resources: dict[str, float]) -> int:
    return int(min(resources.get(kind, 0) // amount for kind, amount in cluster.needs.items()))


def free_places(cluster: ClusterConfig) -> int:
    """Training processes for which nobody uses what they need."""
    by_node: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return _room(cluster, [_places(cluster, free) for free in by_node.values()])


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
