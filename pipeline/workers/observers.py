"""What ranks tell of a training while it goes on."""

from __future__ import annotations

from typing import Any, Self

from pipeline.plan import Plan


class Silence:
    """The observer of all ranks but 0."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing: rank 0 tells."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Poster(Silence):
    """Rank 0's: posts to the driver's board and to the tracking server, and waits for neither."""

    def __init__(self, plan: Plan, board: Any) -> None:
        from pipeline.tracking.tracker import MlflowTracker

        self.name, self.board = plan.record.name, board
        self.tracker = MlflowTracker(plan.tracking_uri, plan.run_id, plan.journal)
        board.post.remote(self.name, 0, {})

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over the figures."""
        self.board.post.remote(self.name, step, metrics)
        self.tracker.log(step, metrics)

    def __exit__(self, *_: object) -> None:
        self.tracker.close()
