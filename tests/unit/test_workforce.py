"""How many workers the nodes have room for, and what is said where that is not enough."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.workers.config import ClusterConfig
from pipeline.workers.workforce import room, shortage


def node(cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({"workers": 4}, [node(1), node(2)], 3),
        ({"workers": 2}, [node(1), node(2)], 2),
        ({"workers": 4, "cpus_per_worker": 1.5}, [node(1), node(2), node(3)], 3),
        ({"workers": 4, "placement": "STRICT_PACK"}, [node(1), node(2)], 2),
        ({"workers": 4, "placement": "STRICT_SPREAD"}, [node(8), node(0), node(2)], 2),
        ({"workers": 4, "placement": "SPREAD"}, [node(8)], 4),
        ({"workers": 4, "gpu": True}, [node(8), node(8, 3), node(1, 4)], 4),
        ({"workers": 8, "gpu": True, "cpus_per_worker": 4}, [node(8, 3), node(1, 4)], 2),
        ({"workers": 8}, [], 0),
    ],
)
def test_room(settings: dict[str, Any], nodes: list[dict[str, Any]], expected: int) -> None:
    assert room(ClusterConfig(**settings), nodes) == expected


def test_shortage_names_what_is_asked_and_what_is_there() -> None:
    cluster = ClusterConfig(workers=4, gpu=True, cpus_per_worker=6)
    assert shortage(cluster, [node(8, 2), node(16)]) == (
        "4 workers of 6 CPU and 1 GPU are needed, but the Ray cluster's 2 nodes have 24 CPU (at most 16 on one), "
        "2 GPU (at most 2 on one): room for 1"
    )
    packed = ClusterConfig(workers=3, placement="STRICT_PACK")
    assert shortage(packed, [node(2)]).endswith(
        "the Ray cluster's 1 node has 2 CPU (at most 2 on one): room for 2 by cluster.placement=STRICT_PACK"
    )
    assert "0 nodes have 0 CPU (at most 0 on one): room for 0" in shortage(ClusterConfig(workers=1), [])


def test_backend_follows_the_device_unless_it_is_named() -> None:
    assert ClusterConfig().collectives == "gloo"
    assert ClusterConfig(gpu=True).collectives == "nccl"
    assert ClusterConfig(gpu=True, backend="gloo").collectives == "gloo"
