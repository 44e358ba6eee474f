"""Stamped vectors on disk: Parquet with a key, an identity and a vector a row, and the stamp in the file's metadata.

`vector` is a fixed-size list of float16 or float32: what the loaders of Milvus, Qdrant and pgvector read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embedding_files import IDENTITY, KEY, VECTOR, EmbeddingFile, repeated
from pipeline.errors import DataError
from pipeline.files import written_whole
from pipeline.stamp import STAMP, Stamp

Float32 = npt.NDArray[np.float32]
Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class Vectors:
    """Stamped vectors in memory.

    Attributes:
        stamp: of all of them.
        keys: (N,) large strings, one a vector.
        identities: (N,) large strings; empty where it is not known.
        vectors_ND: (N, D) float32.
    """

    stamp: Stamp
    keys: pa.Array
    identities: pa.Array
    vectors_ND: Float32

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, places_K: npt.NDArray[np.int64]) -> Vectors:
        """Some of them, by place."""
        places = pa.array(places_K)
        return Vectors(self.stamp, self.keys.take(places), self.identities.take(places), self.vectors_ND[places_K])


def write_vectors(path: Path, vectors: Vectors, dtype: Dtype = "float32") -> None:
    """Write a file; it appears whole or not at all."""
    count, dim = vectors.vectors_ND.shape
    assert count == len(vectors) == len(vectors.identities), "one vector a key"
    assert dim == vectors.stamp.dim, "the stamp tells the dimension"
    values = pa.array(np.ascontiguousarray(vectors.vectors_ND, dtype=dtype).reshape(-1))
    table = pa.table(
        {
            KEY: vectors.keys.cast(pa.large_string()),
            IDENTITY: vectors.identities.cast(pa.large_string()),
            VECTOR: pa.FixedSizeListArray.from_arrays(values, dim),
        }
    ).replace_schema_metadata({STAMP: vectors.stamp.model_dump_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        pq.write_table(table, stream, use_dictionary=[KEY, IDENTITY])  # floats repeat too rarely to try


def read_stamp(path: Path) -> Stamp:
    """The stamp of a file.

    Raises:
        DataError: the file is missing, cut short or no Parquet, or has no stamp.
    """
    return Stamp.parse(EmbeddingFile(path).metadata.get(STAMP.encode()), str(path))


def read_vectors(paths: Sequence[Path]) -> Vectors:
    """Read files of one generation, in order.

    Raises:
        DataError: a file is missing, cut short or empty, has no stamp or another one than the first, or a vector is
            not finite, zero, or of another dimension than its stamp says; a key comes twice.
    """
    assert paths, "at least one file"
    stamp = read_stamp(paths[0])
    keys, identities, blocks = [], [], []
    for path in paths:
        if (other := read_stamp(path)) != stamp:
            raise DataError(
                f"{path} holds vectors of generation {other.generation!r} ({other.digest[:12]}), {paths[0]} of "
                f"{stamp.generation!r} ({stamp.digest[:12]}): one space cannot hold both; read them apart"
            )
        file = EmbeddingFile(path)
        keys.append(file.strings(KEY))
        identities.append(file.strings(IDENTITY))
        blocks += list(file.batches())
    vectors_ND = np.concatenate(blocks)
    if vectors_ND.shape[1] != stamp.dim:
        raise DataError(f"{paths[0]}: vectors have {vectors_ND.shape[1]} values, their stamp says {stamp.dim}")
    whole = Vectors(stamp, pa.concat_arrays(keys), pa.concat_arrays(identities), vectors_ND)
    if (twice := repeated(whole.keys)) is not None:
        raise DataError(f"{paths[0]}{' ...' if len(paths) > 1 else ''}: key {twice!r} comes more than once")
    return whole


def vector_files(place: Path) -> list[Path]:
    """A file itself, or the Parquet files of a folder by name.

    Raises:
        DataError: there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(place.glob("*.parquet"))
    if not found:
        raise DataError(f"{place} holds no vectors (*.parquet); embed first (jobs/embed.py)")
    return found
