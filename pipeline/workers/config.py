"""What a run asks of Ray: plain numbers, read without importing it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.schema import Config


class ClusterConfig(Config):
    """What is asked of Ray."""

    workers: int = Field(2, ge=1, description="training processes")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="go on with as few as these where nodes are gone, and with `workers` again once there is room; "
        "none: never fewer than `workers`",
    )
    cpus_per_worker: float = Field(1, gt=0, description="Ray CPUs that a worker reserves; also its threads")
    gpu: bool = Field(False, description="one GPU a worker, NCCL instead of gloo")
    max_failures: int = Field(
        2, ge=0, description="times that lost workers are replaced, from the last checkpoint, without getting further"
    )
    nodes_wait_s: float = Field(
        600, ge=0, description="seconds that a run waits for a node in place of a lost one; then exit code 75"
    )
    preemption_deadline_s: float = Field(
        25, gt=0, description="seconds from SIGTERM to exit code 75, within which a checkpoint is written"
    )

    @model_validator(mode="after")
    def _range_of_workers(self) -> Self:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

    @property
    def fewest(self) -> int:
        """Training processes below which a run waits for nodes."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def needs(self) -> dict[str, float]:
        """Ray resources of one training process."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.gpu else {})}
