"""Embedding a data set or a list of images with a generation: Ray Data deals the parts out to actors with the model.

A part is read, decoded and preprocessed by the loader's own code within an actor, so that vectors are those that the
model was trained to give. What is done is found again: a run that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import Field

from pipeline.cluster import connect
from pipeline.console import bar
from pipeline.embedding.actor import Job, embed_here, embed_on_ray
from pipeline.embedding.output import Header, Output, PartRecord
from pipeline.embedding.parts import Parts
from pipeline.embedding.worker import too_many
from pipeline.errors import ClusterError
from pipeline.generation import BACKBONE, SELFTEST, Generation
from pipeline.schema import Config
from pipeline.stamp import Stamp
from pipeline.vectors import Dtype


class EmbedConfig(Config):
    """How images are embedded; nothing here changes a vector but `dtype`."""

    dtype: Dtype = Field("float32", description="of the values on disk: float16 or float32")
    batch: int = Field(256, ge=1, le=65536, description="images that go through the model at a time")
    limit: int = Field(100, ge=0, description="images that may turn out not to decode before the run gives up")
    actors: int | None = Field(
        None, ge=0, description="processes with the model; 0: this one, without Ray; none: all that the cluster holds"
    )
    cpus: float = Field(1, gt=0, description="Ray CPUs that one reserves where there is no GPU; also its threads")
    gpu: bool | None = Field(None, description="one GPU an actor; none: if the cluster has any")


def embed(generation: Generation, parts: Parts, out: Path, config: EmbedConfig) -> dict[str, Any]:
    """Embed every image of all parts that are not done yet, with a bar.

    Args:
        generation: the model.
        parts: what is embedded.
        out: folder of the vectors; on a cluster every node must see it, and the artefact, under the same path.
        config: how.

    Returns:
        What _embed.json holds (`Output.finish`).

    Raises:
        GenerationError: it has no backbone, has changed, or no longer gives what it gave.
        DataError: the folder holds other vectors, a key comes twice, the data cannot be read, or more than
            `config.limit` of the images do not decode.
        ClusterError: Ray cannot do it.
    """
    header = Header.of(Stamp.of(generation), config.dtype, parts)
    output = Output(out.expanduser().absolute(), header, parts.names)
    finished = output.compare().get("complete", False)
    if not finished:  # first: what is refused leaves no folder behind
        parts.check()
    with output.alone():
        done = output.begin()
        if missing := [number for number in range(len(parts.names)) if number not in done]:
            if finished:
                parts.check()
            for name in (BACKBONE, SELFTEST):  # not the classifier, which may be larger than the rest by far
                generation.verify_file(name)
            generation.reproduce_selftest()
            _embed_missing(generation, parts, output, config, missing, done)
        return output.finish(done)


def _embed_missing(
    generation: Generation,
    parts: Parts,
    output: Output,
    config: EmbedConfig,
    missing: Sequence[int],
    done: dict[int, PartRecord],
) -> None:
    """Embed the missing parts, and add their records to `done`."""
    gpu, actors = _resources(config)
    job = Job(
        artefact=generation.path.absolute(),
        stamp=output.header.stamp,
        parts=parts,
        output=output,
        batch=config.batch,
        limit=config.limit,
        threads=max(1, int(config.cpus)),
        gpu=gpu,
    )
    if actors:
        cpus, gpus = (None, 1.0) if gpu else (config.cpus, None)
        embedded = embed_on_ray(job, missing, min(actors, len(missing)), cpus, gpus)
    else:
        embedded = embed_here(job, missing)
    rejected = sum(len(record.rejects) for record in done.values())
    images, began = 0, time.monotonic()
    with closing(embedded), bar("embed", len(parts.names), "parts") as show:
        show(len(done), "waiting for workers")
        for number, record in embedded:
            done[number] = record
            rejected += len(record.rejects)
            if rejected > config.limit and record.rejects:
                last = record.rejects[-1]
                raise too_many(rejected, config.limit, record.part, last.key, last.reason)
            images += record.rows
            show(len(done), f"{images / (time.monotonic() - began):,.0f} images/s, {rejected:,} not embedded")


def _resources(config: EmbedConfig) -> tuple[bool, int]:
    """Whether on GPUs, and how many actors.

    Raises:
        ClusterError: there is no room: Ray would wait for ever; or no Ray.
    """
    if config.actors == 0:
        return torch.cuda.is_available() if config.gpu is None else config.gpu, 0
    connect()
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpu = bool(there.get("GPU", 0) >= 1) if config.gpu is None else config.gpu
    kind, each = ("GPU", 1.0) if gpu else ("CPU", config.cpus)
    room = math.floor(there.get(kind, 0) / each)
    if not room or (config.actors or 0) > room:
        raise ClusterError(
            f"{config.actors or 1} embedding processes need {each:g} {kind} each, but the Ray cluster has "
            f"{there.get(kind, 0):g}; lower --actors or --cpus, or add nodes"
        )
    return gpu, config.actors or room
