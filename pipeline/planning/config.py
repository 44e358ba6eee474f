"""What is to be trained and on what, and how one way of spreading it divides among the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from pipeline.errors import ConfigError
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.links import Links
from pipeline.planning.profiles import PROFILES, GpuProfile
from pipeline.schema import Config

GIB = 1 << 30
MOST_GPUS = 1 << 16
GpuName = Literal["v100-32g", "a100-80g", "h100-80g"]
assert get_args(GpuName) == tuple(PROFILES)
STAGE_3_OVERLAP = 0.5
SAMPLE_RATES = (1.0, 0.5, 0.2, 0.1, 0.05)  # searched


class PlanConfig(Config):
    """A training to be planned, and the machines for it.

    Raises:
        ConfigError: the fields are in range, but do not go together.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    identities: int = Field(ge=1, description="identities of the new classifier")
    parents: tuple[PositiveInt, ...] = Field((), description="identities of each frozen parent classifier")
    parent_dim: tuple[PositiveInt, ...] = Field((), description="dimension of all parents, or one each [that of --dim]")
    batch: int = Field(ge=1, description="samples of a step, over all GPUs")
    backbone: BackboneConfig
    gpus: int = Field(ge=1, le=MOST_GPUS, description="GPUs there are; fewer are tried too")
    gpu_memory: float = Field(gt=0, description="memory of a GPU, GiB")
    implementation: Literal["ours", "eager"] = Field(
        "ours", description="ours: logits a tile at a time; eager: public partial FC, all logits at once"
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of matrix products and activations")
    optimiser: Literal["adamw", "sgd"] = Field("adamw", description="of the backbone and of the rows")
    fused_update: bool | None = Field(
        None, description="update rows tile by tile, so that their gradient never exists [where nothing is replicated]"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO of the backbone")
    sample_rate: float | None = Field(None, gt=0, le=1, description="share of the rows in a step's softmax [searched]")
    class_group: int | None = Field(None, ge=1, description="GPUs that share one copy of the classifier [searched]")
    gpu: GpuName = Field("a100-80g", description="whose speeds are taken, where nothing else is given")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of a node")
    bandwidth: float | None = Field(None, gt=0, description="between GPUs of a node, GB/s each way [that of --gpu]")
    latency: float = Field(5.0, ge=0, description="of a round of a collective within a node, microseconds")
    network_bandwidth: float = Field(50.0, gt=0, description="of a node, by all its adapters, GB/s each way")
    network_latency: float = Field(15.0, ge=0, description="of a round of a collective between nodes, microseconds")
    overlap: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the backbone's backward pass beneath which its gradients travel "
        f"[0, as DeepSpeed is started here; at ZeRO 3 {STAGE_3_OVERLAP}]",
    )
    loader_images_per_s: float | None = Field(
        None, gt=0, description="that are decoded for a GPU beneath its steps [never too few]"
    )
    checkpoint_every: int | None = Field(None, ge=1, description="steps from one checkpoint to the next [none]")
    checkpoint_bandwidth: float = Field(
        10.0, gt=0, description="from a GPU to where its checkpoint waits to be written, GB/s"
    )
    overhead: float = Field(1.5, ge=0, description="CUDA context, NCCL buffers, fragments of the allocator, GiB")
    backbone_efficiency: float | None = Field(
        None, gt=0, le=1, description="share of the matrix product's speed that the backbone reaches [that of --gpu]"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.batch < self.gpus:
            raise ConfigError(f"--batch {self.batch} leaves some of {self.gpus} GPUs without a sample: raise it")
        if self.class_group is not None and self.gpus % self.class_group:
            raise ConfigError(f"--class-group {self.class_group} does not divide --gpus {self.gpus}")
        if self.implementation == "eager" and self.class_group not in (None, self.gpus):
            raise ConfigError("--implementation eager knows one class group, of all GPUs: leave --class-group out")
        if self.fused_update and (self.implementation == "eager" or self.class_group not in (None, self.gpus)):
            raise ConfigError("--fused-update needs --implementation ours and one class group: replicas sum gradients")
        if len(self.parent_dim) > 1 and len(self.parent_dim) != len(self.parents):
            raise ConfigError(f"--parent-dim has {len(self.parent_dim)} dimensions for {len(self.parents)} parents")
        if any(dim > self.dim for dim in self.parent_dim):
            raise ConfigError(f"--parent-dim {max(self.parent_dim)} is more than --dim {self.dim}: raise --dim")
        return self

    @property
    def dim(self) -> int:
        """D of the new classifier."""
        return self.backbone.embedding_dim

    @property
    def parent_dims(self) -> tuple[int, ...]:
        """One a parent."""
        several = len(self.parent_dim) > 1
        return self.parent_dim if several else (*self.parent_dim, self.dim)[:1] * len(self.parents)

    @property
    def profile(self) -> GpuProfile:
        """Of the GPU."""
        return PROFILES[self.gpu]

    @property
    def links(self) -> Links:
        """What connects the GPUs."""
        return Links(
            per_node=self.gpus_per_node,
            bandwidth=self.profile.bandwidth if self.bandwidth is None else self.bandwidth * 1e9,
            latency=self.latency * 1e-6,
            network_bandwidth=self.network_bandwidth * 1e9,
            network_latency=self.network_latency * 1e-6,
        )

    @property
    def hidden_share(self) -> float:
        """Of the backbone's backward pass, beneath which its gradients travel."""
        if self.overlap is None:
            return STAGE_3_OVERLAP if self.zero_stage == 3 else 0.0
        return self.overlap

    @property
    def memory_bytes(self) -> float:
        """Bytes of a GPU."""
        return self.gpu_memory * GIB


@dataclass(frozen=True)
class Setting:
    """One way of spreading the training.

    Attributes:
        ranks: W, a GPU each.
        class_group: S, ranks that share one copy of the classifier by rows; a divisor of W.
        sample_rate: r, share of the rows in a step's softmax.
    """

    ranks: int
    class_group: int
    sample_rate: float

    @property
    def replicas(self) -> int:
        """R, copies of the classifier."""
        return self.ranks // self.class_group


@dataclass(frozen=True)
class Share:
    """What the fullest rank has of a setting.

    Attributes:
        samples: that go through its backbone.
        group_batch: B_g, samples whose features its class group gathers.
        rows: C_l of the new classifier.
        sampled_rows: of these, how many are in a step's softmax.
        parents: (rows, dimension) of each parent.
        fused: whether rows are updated tile by tile.
    """

    samples: int
    group_batch: int
    rows: int
    sampled_rows: int
    parents: tuple[tuple[int, int], ...]
    fused: bool

    @classmethod
    def of(cls, config: PlanConfig, setting: Setting) -> Share:
        """Divide. Replicas have to sum the gradient of their rows, so it must exist."""
        rows = -(-config.identities // setting.class_group)
        fused = config.implementation == "ours" and config.fused_update is not False and setting.replicas == 1
        return cls(
            samples=-(-config.batch // setting.ranks),
            group_batch=-(-config.batch // setting.replicas),
            rows=rows,
            sampled_rows=math.ceil(setting.sample_rate * rows),
            parents=tuple(
                (-(-identities // setting.class_group), dim)
                for identities, dim in zip(config.parents, config.parent_dims, strict=True)
            ),
            fused=fused,
        )
