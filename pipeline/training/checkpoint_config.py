"""When a run is saved, and which of its checkpoints stay."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipeline.schema import Config


class CheckpointConfig(Config):
    """How often a run is saved, where, and what is kept."""

    every: int = Field(200, ge=1, description="steps between checkpoints; the last step has one too")
    keep: int = Field(2, ge=1, description="newest ones that are kept; a damaged one is replaced by the one before")
    milestone_every: int | None = Field(None, ge=1, description="steps between those kept for ever; none: no such")
    asynchronous: bool = Field(True, description="write while training goes on, from a second copy in memory")
    verify: bool = Field(True, description="compare the sha256 of what is loaded; sizes are always compared")
    location: str | None = Field(
        None, description="folder or URL (s3://, gs://) for the checkpoints of all runs; none: the run's own folder"
    )

    @model_validator(mode="after")
    def _milestones_are_saved(self) -> Self:
        if self.milestone_every is not None and self.milestone_every % self.every:
            raise ValueError(
                f"milestone_every {self.milestone_every} is no multiple of every {self.every}: it would not be saved"
            )
        return self

    def due(self, step: int, last: int) -> bool:
        """Whether there is to be a checkpoint after `step` updates of `last`."""
        return step % self.every == 0 or step == last

    def forgotten(self, saved: int, steps: list[int]) -> list[int]:
        """Those of the steps whose checkpoints are not kept, once `saved` is one of them.

        Later steps are of a course that the run has left: it went back to an earlier checkpoint.
        """
        later = [step for step in steps if step > saved]
        older = sorted((step for step in steps if step <= saved), reverse=True)[self.keep :]
        return later + [step for step in older if self.milestone_every is None or step % self.milestone_every]
