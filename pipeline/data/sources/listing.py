"""A list of images and their identities: CSV, or Parquet, which may hold the images themselves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.data.sources.base import EXTENSIONS, Reject, Sample, folder_key
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.parquet import open_parquet
from pipeline.redaction import in_short
from pipeline.schema import Config, digest_json

MISSING = "file is missing"
STATS_AT_ONCE = 32  # on a network's file system each waits for an answer
GONE = -1
CHUNK = 1 << 16


class ListSourceConfig(Config):
    """A list with a row for each image."""

    path: Path = Field(description="The list: a .csv with a header, or a .parquet.")
    image_column: str = Field(
        default="path", description="Column of the images' paths, or (Parquet, binary) of the encoded images."
    )
    identity_column: str = Field(default="identity", description="Column of the identities; text or whole numbers.")
    skip_missing: bool = Field(default=False, description="Count files that are missing as rejects; else an error.")
    rows: int = Field(default=8192, ge=1, description="Rows of a .csv in a unit of work (.parquet: a row group).")


class ListSource:
    """Images that a list names (relative paths: to the list's folder) or holds; further columns become attributes.

    A row is a sample: its key comes of the path as it stands in the list, or of the row's number where the list
    holds the images. The list is read a part at a time; a .csv is kept in memory.

    Raises:
        DataError: the list is missing, malformed or empty, or has not the columns.
    """

    min_images = 1

    def __init__(self, config: ListSourceConfig) -> None:
        self.config = config
        self.path = config.path.expanduser().resolve()
        if self.path.suffix.lower() not in (".csv", ".parquet"):
            raise DataError(f"list {self.path} is neither .csv nor .parquet by its name; convert it to one of them")
        self._csv = _read_csv(self.path) if self.path.suffix.lower() == ".csv" else None
        schema = self._schema()
        for column in (config.image_column, config.identity_column):
            if column not in schema.names:
                raise DataError(
                    f"list {self.path} has no column {column!r} but {', '.join(schema.names)}; "
                    "choose with --image-column and --identity-column"
                )
        kind = schema.field(config.image_column).type
        self._holds_images = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not (self._holds_images or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"list {self.path}: column {config.image_column!r} is {kind}, neither paths nor images")
        if not self._starts[-1]:
            raise DataError(f"list {self.path} has no row; give a list with a row for each image")

    @property
    def name(self) -> str:
        """The list's name without its extension."""
        return self.path.stem

    def fingerprint(self) -> str:
        """Sha256 over the list and the options, and over size and modification time of every file that it names.

        Raises:
            DataError: files are missing, and `skip_missing` is not set; names the first.
        """
        options = self.config.model_dump(mode="json", exclude={"path", "rows"})
        files = None if self._holds_images else self._survey()
        return digest_json({"source": "list", "list": file_sha256(self.path), "options": options, "files": files})

    def parts(self) -> list[str]:
        """Ranges of rows, `first-end`; those of a .parquet are its row groups."""
        return [f"{start}-{stop}" for start, stop in pairwise(self._starts.tolist()) if start < stop]

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Yield the rows of one part, in the list's order.

        Raises:
            DataError: a row has no image or no identity, or a file cannot be read.
        """
        config, first = self.config, int(part.split("-")[0])
        rows = self._rows(int(np.searchsorted(self._starts, first, side="right")) - 1)
        others = [name for name in rows.column_names if name not in (config.image_column, config.identity_column)]
        for number, row in enumerate((row for batch in rows.to_batches(1024) for row in batch.to_pylist()), first):
            image, identity = row[config.image_column], _text(row[config.identity_column])
            if image is None or not identity:
                missing = config.identity_column if image is not None else config.image_column
                raise DataError(f"list {self.path}: row {number + 1} has no {missing!r}; mend the list")
            attributes = {name: _text(row[name]) for name in others if row[name] is not None}
            if self._holds_images:
                yield Sample(f"row-{number:09d}", image, "jpg", identity, attributes)
            else:
                yield self._sample(image, identity, {"file": image, **attributes})

    def _sample(self, file: str, identity: str, attributes: dict[str, str]) -> Sample | Reject:
        path, key = self.path.parent / file, folder_key(file)
        try:
            return Sample(key, path.read_bytes(), EXTENSIONS.get(path.suffix.lower(), "jpg"), identity, attributes)
        except FileNotFoundError:
            if self.config.skip_missing:
                return Reject(key, identity, MISSING)
            raise DataError(f"list {self.path}: {path} went missing while it was read; pack again") from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            why = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"list {self.path}: {path} cannot be read: {why}; mend it or the list") from None

    def _schema(self) -> pa.Schema:
        if self._csv is not None:
            return self._csv.schema
        with _parquet(self.path) as file:
            return file.schema_arrow

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Number of each part's first row, and of the rows."""
        if self._csv is not None:
            return np.array([*range(0, len(self._csv), self.config.rows), len(self._csv)])
        with _parquet(self.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return np.cumsum([0, *sizes])

    def _rows(self, part: int, columns: list[str] | None = None) -> pa.Table:
        """Rows of one part."""
        if self._csv is not None:
            rows = self._csv.slice(self._starts[part], self._starts[part + 1] - self._starts[part])
            return rows if columns is None else rows.select(columns)
        try:
            with _parquet(self.path) as file:
                return file.read_row_group(part, columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"list {self.path}: row group {part} cannot be read: {in_short(error)}; mend it") from None

    def _survey(self) -> str:
        """Sha256 over size and modification time of every file."""
        digest, missing, first = hashlib.sha256(), 0, ""
        with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
            for part in range(len(self._starts) - 1):
                column = self._rows(part, [self.config.image_column]).column(0)
                for start in range(0, len(column), CHUNK):
                    files = column[start : start + CHUNK].to_pylist()
                    found = np.array(list(pool.map(self._status, files, chunksize=256)), np.int64).reshape(-1, 2)
                    gone = np.flatnonzero(found[:, 0] == GONE)
                    if len(gone) and not missing:
                        first = f"row {self._starts[part] + start + gone[0] + 1}: {files[gone[0]]}"
                    missing += len(gone)
                    digest.update(found.tobytes())
        if missing and not self.config.skip_missing:
            raise DataError(
                f"list {self.path}: {missing:,} of {self._starts[-1]:,} files are missing, the first in {first}; "
                "mend the list, or pass them over with --skip-missing"
            )
        return digest.hexdigest()

    def _status(self, file: str | None) -> tuple[int, int]:
        try:
            status = os.stat(self.path.parent / (file or ""))  # noqa: PTH116
        except (OSError, ValueError):
            return GONE, 0
        return status.st_size, status.st_mtime_ns


def _read_csv(path: Path) -> pa.Table:
    """All columns as text: 007 is another identity than 7."""
    try:
        with path.open("rb") as stream:
            head = pa.csv.open_csv(stream).schema.names
        if len(set(head)) != len(head):
            raise DataError(f"list {path} has two columns of one name: {', '.join(head)}; rename one")
        convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(head, pa.string()), strings_can_be_null=False)
        parse = pa.csv.ParseOptions(newlines_in_values=True)
        return pa.csv.read_csv(path, convert_options=convert, parse_options=parse)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {path} cannot be read: {in_short(error)}; give a .csv with a header") from None


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return open_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"list {path} cannot be read: {in_short(error)}; give a Parquet file") from None


def _text(value: Any) -> str:
    """A cell as text, empty if there is nothing in it."""
    return "" if value is None else str(value)
