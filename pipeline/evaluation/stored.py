"""Held-out embeddings that an imported generation brought along: all that can be evaluated of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pipeline.console import say
from pipeline.errors import DataError, GenerationError
from pipeline.generation import Generation
from pipeline.parquet import read_parquet

TEST, KEYS = "test.safetensors", "test-keys.parquet"

Float32 = npt.NDArray[np.float32]


def write_stored(folder: Path, keys: pa.Array, vectors_ND: Float32) -> None:
    """Write (N, D) vectors and their N keys into an artefact that is not sealed yet."""
    save_file({"embeddings": vectors_ND}, folder / TEST)
    pq.write_table(pa.table({"key": keys}), folder / KEYS)


def has_stored(generation: Generation) -> bool:
    """Whether it brought held-out embeddings."""
    return TEST in generation.record.files


def stored_vectors(generation: Generation, keys: Sequence[str], data: Path) -> Float32:
    """The embeddings of a data set's samples, found by key: their order in the artefact says nothing.

    Args:
        generation: without a backbone.
        keys: of the samples, as the data set has them.
        data: its folder, for errors.

    Returns:
        (len(keys), D) float32 vectors, in the order of `keys`.

    Raises:
        GenerationError: it brought no held-out embeddings, or their files have changed.
        DataError: samples have none.
    """
    record = generation.record
    if not has_stored(generation):
        raise GenerationError(
            f"generation {record.name!r} at {generation.path} holds no test embeddings to evaluate: "
            "import them under a new name with --test, or leave it out (--generations)"
        )
    generation.verify_file(TEST)
    generation.verify_file(KEYS)
    try:
        vectors_MD: Float32 = load_file(generation.path / TEST)["embeddings"]
        stored = read_parquet(generation.path / KEYS, ["key"]).column("key").combine_chunks()
    except (SafetensorError, pa.ArrowException, KeyError, OSError) as error:
        raise GenerationError(f"generation {record.name!r} at {generation.path} cannot be read: {error}") from None
    place_N = pc.fill_null(pc.index_in(pa.array(keys, pa.large_string()), value_set=stored), -1).to_numpy()
    if len(missing := np.flatnonzero(place_N < 0)):
        raise DataError(
            f"{len(missing)} of {len(keys)} samples of {data} have no embedding in generation {record.name!r}, such as "
            f"{keys[int(missing[0])]!r}: import all of them under a new name, or leave it out (--generations)"
        )
    return np.ascontiguousarray(vectors_MD[place_N])


def evaluable(generations: Mapping[str, Generation]) -> dict[str, Generation]:
    """Those that can embed the held-out images, or brought their embeddings; the others are told, and left out."""
    able = {name: one for name, one in generations.items() if one.record.backbone is not None or has_stored(one)}
    for name in generations.keys() - able.keys():
        say(f"{name} is not evaluated: it was imported without test embeddings")
    return able
