"""What ranks tell of a training while it goes on."""

from __future__ import annotations

from typing import Any, Self

from pipeline.plan import Plan
from pipeline.workers.metrics import Exporter


class Silence:
    """The observer of all ranks but 0: of the run it says nothing, of its own rank it exports what is measured."""

    def __init__(self, plan: Plan, rank: int) -> None:
        name = plan.record.name
        steps = plan.config.generations[name].training.steps
        self.exporter = Exporter(plan.record.family, name, rank, steps)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing: rank 0 tells."""

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """Take this rank's own figures."""
        self.exporter.measured(step, figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.exporter.close()


class Poster(Silence):
    """Rank 0's: posts to the driver's board and to the tracking server, and waits for neither."""

    def __init__(self, plan: Plan, board: Any) -> None:
        from pipeline.tracking.tracker import MlflowTracker

        super().__init__(plan, rank=0)
        self.name, self.board = plan.record.name, board
        self.tracker = MlflowTracker(plan.tracking_uri, plan.run_id, plan.journal)
        board.post.remote(self.name, 0, {})

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over the figures."""
        self.board.post.remote(self.name, step, metrics)
        self.tracker.log(step, metrics)
        self.exporter.reported(metrics)

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """Rank 0's own figures are recorded, too."""
        super().measured(step, figures)
        self.tracker.log(step, figures)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.tracker.close()
