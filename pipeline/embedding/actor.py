"""Actors with a model, to which Ray Data deals out parts; or the same in this process."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import errors
from pipeline.embedding.output import Output, PartRecord
from pipeline.embedding.parts import Parts
from pipeline.embedding.worker import PartEmbedder
from pipeline.errors import ClusterError, GenerationError, PipelineError
from pipeline.generation import Generation
from pipeline.stamp import Stamp

CALLS = 2  # parts at once: while one waits for its first batch or for the disk, the model has the other's batches
RETRIES = 2  # of a part whose actor died: an image that kills decoders must not do so for ever


@dataclass(frozen=True)
class Job:
    """What an actor needs; it travels to it by pickle.

    Attributes:
        artefact: folder of the generation.
        stamp: of it, as the driver found it.
        parts: what is embedded.
        output: where the vectors go.
        batch: images at a time.
        limit: images that may turn out not to decode.
        threads: processor threads of the model, and as many of the decoder.
        gpu: work on a GPU.
    """

    artefact: Path
    stamp: Stamp
    parts: Parts
    output: Output
    batch: int
    limit: int
    threads: int
    gpu: bool


class PartActor:
    """What Ray Data calls for each part: one model a process, opened at the first call.

    A user's mistake is a result like any other: what is raised reaches the driver as a traceback of Ray's.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._opening = job, threading.Lock()
        self._embedder: PartEmbedder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed the part of the row's number; gives back number, and record (JSON) or mistake."""
        number = int(row["number"])
        try:
            record = self._opened().embed(number)
        except PipelineError as error:
            kind = next(one.__name__ for one in type(error).__mro__ if one.__module__ == PipelineError.__module__)
            return {"number": number, "record": "", "kind": kind, "mistake": str(error)}
        return {"number": number, "record": record.model_dump_json(), "kind": "", "mistake": ""}

    def _opened(self) -> PartEmbedder:
        with self._opening:
            if self._embedder is None:
                self._embedder = open_embedder(self._job)
            return self._embedder


def open_embedder(job: Job) -> PartEmbedder:
    """Load the model.

    Raises:
        GenerationError: the artefact is missing here, or is another one.
    """
    torch.set_num_threads(job.threads)
    generation = Generation(job.artefact)
    if Stamp.of(generation) != job.stamp:
        raise GenerationError(f"generation at {job.artefact} is another one here, or changed since the start")
    device = torch.device("cuda", 0) if job.gpu else torch.device("cpu")
    preprocess = generation.record.preprocess
    assert preprocess is not None, "what has a stamp has a preprocessing"
    return PartEmbedder(
        generation.load_backbone().to(device),
        preprocess,
        job.parts,
        job.output,
        batch=job.batch,
        limit=job.limit,
        threads=job.threads,
        device=device,
    )


def embed_here(job: Job, missing: Sequence[int]) -> Generator[tuple[int, PartRecord], None, None]:
    """Embed parts in this process, as an actor does; yields and raises as `embed_on_ray`."""
    embedder = open_embedder(job)
    with ThreadPoolExecutor(CALLS, "embed") as calls:
        numbers = {calls.submit(embedder.embed, number): number for number in missing}
        try:
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        finally:
            calls.shutdown(cancel_futures=True)


def embed_on_ray(
    job: Job, missing: Sequence[int], actors: int, cpus: float | None, gpus: float | None
) -> Generator[tuple[int, PartRecord], None, None]:
    """Embed parts on a pool of actors; closing the generator ends them.

    Args:
        job: for the actors.
        missing: numbers of the parts.
        actors: how many there are.
        cpus: that each reserves, or
        gpus: that each reserves: Ray advises against both.

    Yields:
        Number and record of a part, as it is done, in any order.

    Raises:
        PipelineError: of an actor, as it is.
        ClusterError: Ray lost the actors.
    """
    import ray.data  # takes a second, and is needed only here

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would print tracebacks beside our own line
    pool = ray.data.ActorPoolStrategy(
        size=actors,
        max_tasks_in_flight_per_actor=CALLS,
        max_concurrent_calls_per_actor=CALLS,
        enable_true_multi_threading=True,
    )
    with warnings.catch_warnings():  # Ray warns of its own defaults, and of the only way there is to bound retries
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        # A block a part: an actor takes up the next as soon as it has room, however long each takes.
        numbers = ray.data.from_items([{"number": number} for number in missing], override_num_blocks=len(missing))
        embedded = numbers.map(
            PartActor,  # type: ignore[arg-type]  # Ray's types know no class that is called
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=RETRIES,
        )
    blocks: Any = iter(embedded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        with closing(blocks):
            for row in (row for block in blocks for row in block.to_pylist()):
                if row["mistake"]:
                    kind: type[PipelineError] = getattr(errors, row["kind"])
                    raise kind(row["mistake"])
                yield row["number"], PartRecord.model_validate_json(row["record"])
    except ray.exceptions.RayError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ClusterError(
            f"embedding on Ray failed ({told[-1][:300]}); see Ray's logs, then run it again: it goes on"
        ) from error
