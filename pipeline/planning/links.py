"""Seconds of collectives: latency and bandwidth, rings within a node and between nodes.

A message of n bytes takes alpha + n / beta (Hockney, "The communication challenge for MPP", Parallel Computing 1994).
Rings of n ranks: a gather or reduce-scatter takes n - 1 rounds and moves (n - 1) / n of the whole through each rank, an
all-reduce is one of each; a short all-reduce goes by recursive doubling, in log2 n rounds of the whole (Thakur,
Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005). Of several nodes, the nodes
first meet over the network, and then each one's GPUs among themselves, one after the other (hierarchical, as in Jia et
al., arXiv:1807.11205, section 3.3): nothing is assumed to be pipelined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """What connects the GPUs.

    Attributes:
        per_node: GPUs of a node.
        bandwidth: bytes/s each way of a GPU, to the others of its node.
        latency: seconds of a round within a node.
        network_bandwidth: bytes/s each way of a node, by all its adapters.
        network_latency: seconds of a round between nodes.
    """

    per_node: int
    bandwidth: float
    latency: float
    network_bandwidth: float
    network_latency: float

    def gather(self, ranks: int, size: float, stride: int = 1) -> float:
        """Seconds of a gather, or of a reduce-scatter, whose whole is `size` bytes.

        Args:
            ranks: that meet.
            size: bytes, of all parts together.
            stride: every how many-th rank of the machine it is; as many groups meet at the same time.
        """
        local, nodes, sharing = self._layout(ranks, stride)
        within = _rounds(local, self.latency, size / self.bandwidth)
        return within + _rounds(nodes, self.network_latency, sharing * size / self.network_bandwidth)

    def all_reduce(self, ranks: int, size: float, stride: int = 1) -> float:
        """Seconds of a sum over all, of `size` bytes: by rings or by recursive doubling, whichever is faster."""
        local, nodes, sharing = self._layout(ranks, stride)
        doubling = math.ceil(math.log2(local)) * (self.latency + size / self.bandwidth)
        across = self.network_latency + sharing * size / self.network_bandwidth  # one GPU of a node speaks for it
        doubling += math.ceil(math.log2(nodes)) * across
        return min(2 * self.gather(ranks, size, stride), doubling)

    def _layout(self, ranks: int, stride: int) -> tuple[int, int, int]:
        """Members in a node, nodes, and groups that share a node's network. Groups are taken to come out even."""
        local = min(ranks, max(1, self.per_node // stride))
        return local, -(-ranks // local), min(stride, self.per_node)


def _rounds(ranks: int, latency: float, whole: float) -> float:
    """A ring: so many rounds, each of one part of the whole."""
    return (ranks - 1) * (latency + whole / ranks)
