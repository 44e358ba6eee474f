"""Which ranks hold a classifier together, and which hold the same part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class ClassMesh:
    """A grid of ranks: a row of it (`shards`) holds each prototype once, a column (`replicas`) the same ones.

    With thousands of ranks a gather over all of them costs more than it saves: a group that is just large enough
    holds the classifier, and the groups sum their row gradients. Without `grid` there is one process.
    """

    grid: DeviceMesh | None = None

    @classmethod
    def of_world(cls, device_type: str, shard_ranks: int | None = None) -> ClassMesh:
        """Cut the world into groups of `shard_ranks` neighbouring ranks; None: one group. Collective.

        Raises:
            ConfigError: the groups do not come out even.
        """
        world_size = dist.get_world_size()
        shards = shard_ranks or world_size
        if shards > world_size or world_size % shards:
            raise ConfigError(
                f"classifier.shard_ranks={shards} does not divide the {world_size} training processes; "
                "take a divisor, or leave it out to use them all"
            )
        return cls(init_device_mesh(device_type, (world_size // shards, shards), mesh_dim_names=("replica", "shard")))

    @property
    def shards(self) -> int:
        """Ranks that hold the classifier together."""
        return 1 if self.grid is None else self.grid.size(1)

    @property
    def shard(self) -> int:
        """Which part is this rank's."""
        return 0 if self.grid is None else self.grid.get_local_rank("shard")

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part."""
        return 1 if self.grid is None else self.grid.size(0)

    @property
    def replica(self) -> int:
        """Which of them is this rank."""
        return 0 if self.grid is None else self.grid.get_local_rank("replica")

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.shards * self.replicas

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """None where there is nobody to talk to."""
        return None if self.grid is None or self.shards == 1 else self.grid.get_group("shard")

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """None where there is nobody to talk to."""
        return None if self.grid is None or self.replicas == 1 else self.grid.get_group("replica")

    def group_parts(self, parts: list[int]) -> list[int]:
        """Of the samples of every rank of the world, those of this rank's shard group."""
        assert len(parts) == self.ranks
        return parts[self.replica * self.shards :][: self.shards]
