"""What a run asks of Ray: plain numbers, read without importing it."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.redaction import without_secret
from pipeline.schema import Config

# Set before a worker imports torch. Threads that wait must sleep: on a small machine spinning ones take five to ten
# times the throughput of everybody.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

_SECRET = re.compile(r"PASS|SECRET|TOKEN|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)


class ClusterConfig(Config):
    """What is asked of Ray."""

    workers: int = Field(2, ge=1, description="training processes")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="go on with as few as these where nodes are gone, and with `workers` again once there is room; "
        "none: never fewer than `workers`",
    )
    cpus_per_worker: float = Field(
        1, gt=0, description="Ray CPUs that a worker reserves; also its threads, which decode the images beside a GPU"
    )
    gpu: bool = Field(False, description="one GPU a worker")
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="what collectives go through; auto: NCCL with GPUs, gloo without"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="on as few nodes as it goes, or on as many; strict: on one node, or on a node each"
    )
    environment: dict[str, str] = Field({}, description="variables of the workers, such as NCCL's; no secrets")
    max_failures: int = Field(
        2, ge=0, description="times that lost workers are replaced, from the last checkpoint, without getting further"
    )
    nodes_wait_s: float = Field(
        600, ge=0, description="seconds that a run waits for a node in place of a lost one; then exit code 75"
    )
    preemption_deadline_s: float = Field(
        25, gt=0, description="seconds from SIGTERM to exit code 75, within which a checkpoint is written"
    )

    @field_validator("environment")
    @classmethod
    def _environment_has_no_secret(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if _SECRET.search(name):
                raise ValueError(f"{name} looks like a secret, and a config is kept and shown: set it on the nodes")
            without_secret(value)
        return environment

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "nccl" and not self.gpu:
            raise ValueError("backend=nccl needs gpu=true")
        return self

    @model_validator(mode="after")
    def _range_of_workers(self) -> Self:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

    @property
    def threads(self) -> int:
        """Of a worker, for torch and for the decoder."""
        return max(1, int(self.cpus_per_worker))

    @property
    def fewest(self) -> int:
        """Training processes below which a run waits for nodes."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def collectives(self) -> str:
        """The backend of the process group."""
        return ("nccl" if self.gpu else "gloo") if self.backend == "auto" else self.backend

    @property
    def needs(self) -> dict[str, float]:
        """Ray resources of one training process."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.gpu else {})}
