"""Embeddings that another system wrote: Parquet with a vector a row, read in batches and checked value by value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.parquet import open_parquet, read_parquet
from pipeline.redaction import in_short

KEY, IDENTITY, VECTOR = "key", "identity", "vector"
ROWS = 1 << 14  # at a time

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingFile:
    """A Parquet file of embeddings: column `vector`, lists of floats, and `key` or `identity`, strings.

    Attributes:
        path: of the file.
    """

    path: Path

    @cached_property
    def digest(self) -> str:
        """Sha256 of the file, 64 hex digits.

        Raises:
            DataError: it is missing or cannot be read.
        """
        with self._errors():
            return file_sha256(self.path)

    @cached_property
    def rows(self) -> int:
        """Number of vectors.

        Raises:
            DataError: the file is missing, or no Parquet.
        """
        with self._errors(), open_parquet(self.path) as file:
            return int(file.metadata.num_rows)

    @cached_property
    def metadata(self) -> dict[bytes, bytes]:
        """What its schema says beside the columns.

        Raises:
            DataError: the file is missing, or no Parquet.
        """
        with self._errors(), open_parquet(self.path) as file:
            return dict(file.schema_arrow.metadata or {})

    @cached_property
    def dim(self) -> int:
        """Values of each vector, as the first one has them.

        Raises:
            DataError: the file cannot be read, or its column `vector` holds no lists of floats.
        """
        return int(next(self.batches()).shape[1])

    def strings(self, column: str) -> pa.Array:
        """(N,) large strings of `key` or `identity`.

        Raises:
            DataError: there is no row, the column is missing, or a row has no string in it.
        """
        self._check_there(column)
        with self._errors():
            values = read_parquet(self.path, [column]).column(column).combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or values.null_count:
            raise DataError(f"{self.path}: column {column!r} must hold a string in every row; it is {values.type}")
        return values.cast(pa.large_string())

    def batches(self) -> Iterator[Float32]:
        """Read the vectors in the file's order.

        Yields:
            (B, D) float32 vectors, finite and none of them 0.

        Raises:
            DataError: the file cannot be read or has no row; a vector is missing, of another length, no number, or 0.
        """
        self._check_there(VECTOR)
        first, dim = 0, None
        with self._errors(), open_parquet(self.path) as file:
            for batch in file.iter_batches(ROWS, columns=[VECTOR]):
                vectors_BD = self._vectors(batch.column(VECTOR), first, dim)
                yield vectors_BD
                first, dim = first + len(vectors_BD), vectors_BD.shape[1]

    def _vectors(self, column: Any, first: int, dim: int | None) -> Float32:
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(kind(column.type) for kind in kinds) or not pa.types.is_floating(column.type.value_type):
            raise DataError(f"{self.path}: column {VECTOR!r} must hold lists of floats; it is {column.type}")
        length_B = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        dim = int(length_B[0]) if dim is None else dim
        self._refuse(length_B != dim, first, f"has another length than the {dim} values of the first")
        values = pc.list_flatten(column).cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        vectors_BD: Float32 = values.reshape(len(column), dim)  # a missing value is a NaN
        self._refuse(np.asarray(~np.isfinite(vectors_BD).all(axis=1)), first, "holds a value that is no number")
        self._refuse(np.asarray(~vectors_BD.any(axis=1)), first, "is all zeros, which has no direction")
        return vectors_BD

    def _refuse(self, wrong_B: npt.NDArray[np.bool_], first: int, what: str) -> None:
        if wrong_B.any():
            raise DataError(
                f"{self.path}: the vector of row {first + int(np.argmax(wrong_B))} (from 0) {what}; "
                "mend it or leave the row out"
            )

    def _check_there(self, column: str) -> None:
        with self._errors(), open_parquet(self.path) as file:
            names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"{self.path} has no column {column!r}, but {', '.join(map(repr, names)) or 'none'}")
        if not self.rows:
            raise DataError(f"{self.path} has no row; write one a vector")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{self.path} is missing; give a Parquet file of embeddings") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {in_short(error)}") from None


def repeated(names: pa.Array | pa.ChunkedArray) -> str | None:
    """A name that stands more than once, if there is one; missing names are left out."""
    if pc.count_distinct(names, mode="only_valid").as_py() == len(names) - names.null_count:
        return None
    counts = names.drop_null().value_counts()
    twice: str = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()].as_py()
    return twice
