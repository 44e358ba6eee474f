"""Checkpoints of a running training: everything by full name or by row range, so that any world size can read them.

torch.distributed.checkpoint writes the tensors, from a copy and in a thread of its own while training goes on; the
checkpoint begins to exist when all ranks have written (see `checkpoint_place`). One is in flight at most.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from pipeline.console import say
from pipeline.errors import TrainingError
from pipeline.redaction import with_kind
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.checkpoint_files import Reader, Writer
from pipeline.training.checkpoint_place import CheckpointRecord, DamagedError, FileEntry, Origin, Place, TakenOverError
from pipeline.training.checkpoint_state import Staging, State


@dataclass
class _Pending:
    """A checkpoint in flight."""

    step: int
    written: Future[Any]


class Checkpoints:
    """Saves a run's state and finds it again. As a context, it leaves nothing in flight.

    Args:
        config: how.
        config_digest: of all that shapes the run; a checkpoint of another one is neither resumed nor removed.

    Attributes:
        origin: written into each, for people.
        taken_at: `time.monotonic` of when the state of the newest whole one was taken; None: this process has none yet.
        claim: by which this group of ranks holds the place, from its first `restore` on; empty: it never restored.
    """

    def __init__(self, config: CheckpointConfig, config_digest: str) -> None:
        self.config, self.config_digest = config, config_digest
        self.origin, self.claim = Origin(), ""
        self._held: str | None = None  # the place that is claimed
        self.taken_at: float | None = None
        self._staging = Staging()
        self._pending: _Pending | None = None
        self._has_waited = False

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        """Of the thread that writes: its collectives must not meet those of a step."""
        group = dist.new_group(backend="gloo")
        assert group is not None
        return cast(dist.ProcessGroup, group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.join()
        elif self._pending is not None:
            self._pending.written.exception()  # what ended the run is told, not what became of its last checkpoint

    def save(self, where: str | Path, step: int, state: State, counters: dict[str, int]) -> None:
        """Begin to write a checkpoint; it exists when `join` has returned. Collective.

        Args:
            where: the folder or URL of the run's checkpoints.
            step: updates done.
            state: (rows of) tensors by name.
            counters: rank 0's are kept.

        Raises:
            TrainingError: on every rank, if any could not write the one before, or this one unless asynchronous.
        """
        self._tell_waiting(step)
        self.join()
        place = Place(where)
        folder = self._agreed(place.new_folder(self.config_digest))

        def commit(files: dict[str, FileEntry]) -> None:
            record = CheckpointRecord(
                step=step,
                config_digest=self.config_digest,
                folder=folder,
                files=files,
                world_size=dist.get_world_size(),
                origin=self.origin,
                counters=counted,
            )
            if place.where == self._held:
                place.check_claim(self.config_digest, self.claim)
            place.commit(record)
            self._tidy(place, step)

        counted, now = dict(counters), time.monotonic()
        writer = Writer(place, place.path(step, folder), commit)
        if self.config.asynchronous:
            staged = cast(Any, self._staging)
            written = async_save(state, storage_writer=writer, process_group=self._group, async_stager=staged)
            self._pending = _Pending(step, cast("Future[Any]", written))
            self._pending.written.add_done_callback(partial(self._is_written, now))
            return
        try:
            save_sharded(state, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            raise self._unwritten(step, error) from error
        self.taken_at = now

    def _is_written(self, taken_at: float, written: Future[Any]) -> None:
        """In the thread that writes."""
        if not written.cancelled() and written.exception() is None:
            self.taken_at = taken_at

    def join(self) -> None:
        """Wait for the checkpoint in flight, if there is one. Collective.

        Raises:
            TrainingError: on every rank, if any could not write its part.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.written.result()
        except CheckpointException as error:
            raise self._unwritten(pending.step, error) from error

    def restore(self, where: str | Path, state: State) -> CheckpointRecord | None:
        """Fill `state`'s tensors in place from the newest checkpoint that is whole. Collective.

        The first time, this group of ranks takes the place over: whichever held it commits nothing more. Orphans of
        its saves are removed.

        Returns:
            Its record; None if there never was one.

        Raises:
            TrainingError: none of those that are there is whole; or one does not fit what this run trains.
        """
        self.join()
        place = Place(where)
        told = self._take_over(place) if dist.get_rank() == 0 else None
        self._held = place.where
        self.claim, found = cast(tuple[str, list[CheckpointRecord | DamagedError]], self._agreed(told))
        for number, one in enumerate(found):
            wrong = one if isinstance(one, DamagedError) else self._load(place, one, state)
            if wrong is None:
                assert isinstance(one, CheckpointRecord)
                return one
            if number + 1 == len(found):
                raise TrainingError(
                    f"no checkpoint at {place.where} is whole; {wrong}; restore one, or start over with --fresh"
                )
            if dist.get_rank() == 0:
                say(f"checkpoint at {place.where}: {wrong}; the one before it is taken")
        return None

    def _take_over(self, place: Place) -> tuple[str, list[CheckpointRecord | DamagedError]]:
        """The claim, and what there is of this config, newest first."""
        if not (claim := self.claim):
            claim = place.claim(self.config_digest)
            for step in place.steps():
                with suppress(DamagedError):  # told when it is read
                    place.reap(step, self.config_digest)
        return claim, list(place.found(self.config_digest))

    def _load(self, place: Place, record: CheckpointRecord, state: State) -> DamagedError | None:
        """Fill `state`, or find what is damaged; all ranks find the same."""
        reader: Reader | None = None
        mine: DamagedError | None = None
        try:
            reader = Reader(place, record, self.config.verify)
        except DamagedError as error:
            mine = error
        told: list[DamagedError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine, group=self._group)
        if (damage := next(filter(None, told), None)) is not None:
            return DamagedError(f"step {record.step}: {damage}")
        try:
            load_sharded(cast(Any, state), storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, DamagedError):
                return DamagedError(f"step {record.step}: {cause}")
            raise TrainingError(
                f"checkpoint of step {record.step} at {place.where} cannot be loaded on rank {rank}: "
                f"{with_kind(cause)}; if other code wrote it, start over with --fresh"
            ) from error
        return None

    def _tidy(self, place: Place, saved: int) -> None:
        """Remove the checkpoints that are not kept, on rank 0. Nothing is lost if that fails: it is tried again."""
        try:
            found = place.found(self.config_digest)
            records = {one.step: one for one in found if isinstance(one, CheckpointRecord)}
            for step in self.config.forgotten(saved, list(records)):
                place.remove(records[step])
        except Exception as error:  # noqa: BLE001  each file system has its own classes
            say(f"old checkpoints at {place.where} could not be removed: {with_kind(error)}")

    def _tell_waiting(self, step: int) -> None:
        """Once, and on rank 0."""
        pending = self._pending
        if pending is None or pending.written.done() or self._has_waited or dist.get_rank() != 0:
            return
        self._has_waited = True
        say(
            f"checkpoint of step {pending.step} is not written yet, and that of step {step} is due: training waits; "
            "raise training.checkpoints.every, or take a faster place"
        )

    def _unwritten(self, step: int, error: CheckpointException) -> TrainingError:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, TakenOverError):
            return TrainingError(
                f"checkpoint of step {step} is not kept: {cause} has taken the run over since; this is a second run of "
                "the same name, or a part of the run that was believed lost: leave the other one alone"
            )
        return TrainingError(
            f"checkpoint of step {step} could not be written on rank {rank}: {with_kind(cause)}; the one before it "
            "stands: mend the place, and run again to go on from there"
        )

    def _agreed(self, value: Any) -> Any:
        """Rank 0's."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
