"""Training on the processes that `torchrun` has started, without Ray: each is a rank, and rank 0 is the driver too.

Rank 0 does the run; the others wait for the plans of its generations, and train them with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, StoppedError
from pipeline.plan import Plan
from pipeline.run import run
from pipeline.termination import on_sigterm
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.stopping import Wish
from pipeline.workers.config import ClusterConfig
from pipeline.workers.foreman import Progress
from pipeline.workers.rank import RankObserver, train_rank

PATIENCE = timedelta(days=7)  # of the other ranks, while rank 0 packs, registers, evaluates


def run_rank(config: RunConfig, fresh: bool) -> None:
    """This rank's part of a run; it has the same config on all ranks.

    Raises:
        ConfigError: torchrun has started other than the config's number of processes.
        StoppedError: a rank was told to end (SIGTERM); the last checkpoint stands.
    """
    os.environ.update(config.cluster.environment)
    device = _device(config.cluster)
    dist.init_process_group(config.cluster.collectives)
    _check_world(config.cluster)
    crew = Crew(device)
    with on_sigterm(crew.terminate):
        if dist.get_rank() == 0:
            with crew:
                run(config, fresh, crew.train)
        else:
            crew.follow()
    dist.destroy_process_group()


def _device(cluster: ClusterConfig) -> torch.device:
    if not cluster.gpu:
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"cluster.gpu needs a GPU a process, but torchrun starts a process number {index + 1} where there are "
            f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_world(cluster: ClusterConfig) -> None:
    ranks = dist.get_world_size()
    if not cluster.fewest <= ranks <= cluster.workers:
        asked = f"{cluster.fewest} to {cluster.workers}" if cluster.fewest < cluster.workers else f"{cluster.workers}"
        raise ConfigError(
            f"torchrun has started {ranks} processes, but the config is for cluster.workers={asked}: start as many, or "
            f"add cluster.workers={ranks} to the command"
        )


class Crew:
    """All ranks, as rank 0 directs them. As a context of rank 0's, it lets the others go at the end.

    Whoever fails in training ends, and torchrun ends the others: they may wait in a collective.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.training, self.terminated = device, False, False
        self.group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if not self.training:
            self._agreed(None)

    def terminate(self) -> None:
        """SIGTERM: in training, all ranks save a checkpoint after the step that they are in."""
        self.terminated = True
        if not self.training:
            raise KeyboardInterrupt

    def train(self, plans: Sequence[Plan], on_progress: Progress) -> None:
        """Rank 0's: train generations, one after the other.

        Raises:
            StoppedError: a rank was told to end; the last checkpoint stands.
        """
        self._agreed(list(plans))
        for plan in plans:
            on_progress(plan.record.name, 0, {})
            teller = Teller(plan, on_progress)
            with teller.tracker:
                self._train(plan, teller)

    def follow(self) -> None:
        """The others': train what rank 0 says, until it is done.

        Raises:
            StoppedError: as `train`.
        """
        while (plans := self._agreed(None)) is not None:
            for plan in plans:
                self._train(plan, Quiet())

    def _train(self, plan: Plan, observer: RankObserver) -> None:
        self.training = True
        if not train_rank(plan, self.device, observer, self._listen):
            raise StoppedError(f"{plan.record.name}: told to end (SIGTERM); its last step is in a checkpoint")
        self.training = False

    def _listen(self) -> Wish:
        return Wish.NOW if self.terminated else Wish.GO_ON

    def _agreed(self, plans: list[Plan] | None) -> list[Plan] | None:
        """Rank 0's."""
        told = [plans]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]


class Quiet:
    """The observer of all ranks but 0."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing: rank 0 tells."""

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """Nothing: there is no Ray that would export it."""


class Teller:
    """Rank 0's observer: shows the progress, and has all figures recorded."""

    def __init__(self, plan: Plan, on_progress: Progress) -> None:
        self.name, self.on_progress = plan.record.name, on_progress
        self.tracker = MlflowTracker(plan.tracking_uri, plan.run_id, plan.journal)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over the figures of the run."""
        self.on_progress(self.name, step, metrics)
        self.tracker.log(step, metrics)

    def measured(self, step: int, figures: dict[str, float]) -> None:
        """Hand over those of this rank."""
        self.tracker.log(step, figures)
