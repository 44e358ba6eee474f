"""Import of an old model of which only embeddings are left: no backbone, no classifier, a gallery that must be served.

The classifier is synthesised whole: the prototype of an identity is the mean of its unit vectors, at length 1.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.code import code_version
from pipeline.config import NAME, differing_keys
from pipeline.embedding_files import IDENTITY, KEY, EmbeddingFile, repeated
from pipeline.errors import ConfigError, DataError, GenerationError, PipelineError, RegistryError
from pipeline.evaluation.stored import write_stored
from pipeline.generation import IDENTITIES, RECORD, Generation, GenerationRecord, complete, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.margins import MarginConfig
from pipeline.registry import DatasetInput, Registry
from pipeline.schema import digest_json

SCALE = 20.0
CANCELLED = 1e-6  # shortest mean of unit vectors that still has a direction

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Import:
    """What is left of an old model.

    Attributes:
        name: of the generation that it becomes.
        train: embeddings of images whose identities are known: columns `identity` and `vector`.
        test: embeddings of held-out images: columns `key`, as the test set's samples have it, and `vector`; None:
            the generation can be a parent, but is not evaluated.
        scale: factor on the cosines in the influence loss. The old classifier had one, which embeddings do not tell.
            Cosines are at most 1: without a factor the softmax over many identities is all but even, and a perfect
            feature loses nearly as much as a random one.
    """

    name: str
    train: EmbeddingFile
    test: EmbeddingFile | None = None
    scale: float = SCALE

    @cached_property
    def config(self) -> dict[str, object]:
        """All that shapes the artefact.

        Raises:
            DataError: a file is missing or cannot be read.
        """
        files = {"train": self.train, "test": self.test}
        told = {what: one and {"sha256": one.digest, "rows": one.rows} for what, one in files.items()}
        return {"imported": told, "scale": self.scale}

    def check(self) -> None:
        """Check what can be checked before anything is read.

        Raises:
            ConfigError: the name or the scale cannot be used.
        """
        if not re.fullmatch(NAME, self.name):
            raise ConfigError(f"--name {self.name!r} cannot name a generation: use letters, digits, '.', '_' and '-'")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(f"--scale {self.scale} must be a number above 0; {SCALE:g} is the default")


def import_generation(source: Import, registry: Registry, home: Path) -> Generation:
    """Make, seal and register a generation of embeddings; what is there already is completed, or left alone.

    Args:
        source: of the embeddings.
        registry: of the family.
        home: of the product; the artefact goes to runs/FAMILY/generations/NAME there.

    Raises:
        ConfigError: the name or the scale cannot be used.
        DataError: a file cannot be read, lacks a column, or holds a vector that is none.
        GenerationError: the name is taken by other content, or the artefact has changed.
        RegistryError: the name is registered for another generation, or the store refuses.
    """
    source.check()
    destination = home / "runs" / registry.family / "generations" / source.name
    if (destination / RECORD).is_file():
        generation = Generation(destination)
        _refuse_other(generation, source)
        generation.verify()
    else:
        _refuse_registered(registry, source.name, destination)
        generation = seal_embeddings(source, registry.family, destination)
    known = registry.find(source.name)
    if known is None or known.digest != generation.digest:  # another digest is refused by the registry
        _register(source, registry, generation)
    return generation


def class_means(train: EmbeddingFile) -> tuple[IdentityTable, Float32]:
    """The mean of the unit vectors of each identity, at length 1, summed in float64.

    Returns:
        The identities, sorted, and their (C, D) float32 means.

    Raises:
        DataError: the file cannot be read, has fewer than two identities, or vectors that cancel out.
    """
    key_N = train.strings(IDENTITY)
    keys = pc.unique(key_N)
    table = IdentityTable(keys.take(pc.sort_indices(keys)))
    if len(table) < 2:
        raise DataError(
            f"{train.path} has 1 identity, {table.column[0].as_py()!r}; a classifier needs at least two: "
            f"check its column {IDENTITY!r}"
        )
    row_N, sum_CD, first = table.rows_of(key_N), np.zeros((len(table), train.dim)), 0
    for vectors_BD in train.batches():
        wide_BD = vectors_BD.astype(np.float64)
        wide_BD /= np.linalg.norm(wide_BD, axis=1, keepdims=True)
        np.add.at(sum_CD, row_N[first : first + len(wide_BD)], wide_BD)
        first += len(wide_BD)
    length_C1 = np.linalg.norm(sum_CD, axis=1, keepdims=True)
    if (cancelled_C := length_C1[:, 0] < CANCELLED * np.bincount(row_N)).any():
        key = table.column[int(np.argmax(cancelled_C))].as_py()
        raise DataError(f"{train.path}: the vectors of identity {key!r} cancel out, so it has no mean; leave it out")
    return table, (sum_CD / length_C1).astype(np.float32)


def seal_embeddings(source: Import, family: str, destination: Path) -> Generation:
    """Make the artefact at `destination`; if that fails, nothing is left.

    Raises:
        DataError: a file cannot be read, lacks a column, or holds a vector that is none.
    """
    table, mean_CD = class_means(source.train)
    record = GenerationRecord(
        family=family,
        name=source.name,
        backbone=None,
        preprocess=None,
        dim=mean_CD.shape[1],
        margin=MarginConfig(name="norm_softmax", scale=source.scale),
        identities=len(table),
        config=source.config,
        config_digest=digest_json(source.config),
        data_digest=source.train.digest,
        code_version=code_version(),
    )
    beside = destination.with_name(f".{source.name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    try:
        write_classifier_part(beside, torch.from_numpy(mean_CD), 0, len(table))
        table.save(beside / IDENTITIES)
        if source.test is not None:
            write_stored(beside, *_held_out(source.test, record.embedding_dim))
        return complete(beside, destination, record)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _held_out(test: EmbeddingFile, dim: int) -> tuple[pa.Array, Float32]:
    """(N,) keys and (N, D) vectors."""
    keys = test.strings(KEY)
    if (twice := repeated(keys)) is not None:
        raise DataError(f"{test.path}: key {twice!r} stands twice; a sample has one embedding")
    if test.dim != dim:
        raise DataError(f"{test.path} has vectors of {test.dim} values, --train of {dim}; give those of one model")
    vectors_ND, first = np.empty((len(keys), dim), np.float32), 0
    for vectors_BD in test.batches():
        vectors_ND[first : first + len(vectors_BD)] = vectors_BD
        first += len(vectors_BD)
    return keys, vectors_ND


def _refuse_other(generation: Generation, source: Import) -> None:
    record = generation.record
    if record.backbone is not None:
        raise GenerationError(f"generation {record.name!r} at {generation.path} was trained here; take another name")
    if differences := differing_keys(record.config, source.config):
        raise GenerationError(
            f"generation {record.name!r} at {generation.path} was made of other content: {', '.join(differences)}; "
            "take another name"
        )


def _refuse_registered(registry: Registry, name: str, destination: Path) -> None:
    if (known := registry.find(name)) is not None:
        raise RegistryError(
            f"generation {name!r} is registered as version {known.version}, whose artefact is not at {destination} "
            f"but was at {known.path}: restore it, or take another name"
        )


def _register(source: Import, registry: Registry, generation: Generation) -> None:
    """Make it a version; its run tells where it comes from, and has no training."""
    record = generation.record
    path = source.train.path.absolute()
    dataset = DatasetInput(path.stem, str(path), record.data_digest, source.train.rows, record.identities)
    tags = {"config_digest": record.config_digest, "code_version": record.code_version, "imported": "true"}
    run_id = registry.start_run(record.name, {"imported": "true", "scale": source.scale}, tags, dataset)
    try:
        registry.register(run_id, generation, {})
    except PipelineError:
        registry.finish_run(run_id, "FAILED")
        raise
    registry.finish_run(run_id)
