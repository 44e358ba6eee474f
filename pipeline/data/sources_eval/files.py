"""What sources of listed files share: tables of text, images on disk, and units of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from pipeline.errors import DataError


def read_text_table(
    path: Path, columns: Mapping[str, pa.DataType], delimiter: str = ",", header: bool = False
) -> pa.Table:
    """Read columns of a delimited text file.

    Args:
        path: of the file.
        columns: type of each column that is wanted; a bool is 0 or 1. Without a header, these are all columns in order.
        delimiter: between the cells.
        header: whether the first line names the columns; cells may then be quoted.

    Raises:
        DataError: the file is missing or empty, or a row does not fit; names file and row, the first line being row 1.
    """
    read = csv.ReadOptions(use_threads=False, column_names=None if header else list(columns))
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if header else False)
    convert = csv.ConvertOptions(
        column_types=dict(columns),
        include_columns=list(columns),
        null_values=[],
        true_values=["1"],
        false_values=["0"],
    )
    try:
        return csv.read_csv(path, read, parse, convert)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pa.ArrowInvalid, KeyError) as error:
        reason = " ".join(str(error.args[0]).split()).replace("Row #", "row ")
        raise DataError(f"{path} is malformed: {reason}; mend that file") from None


def read_image(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}; restore it") from None


def stamps(folder: Path, files: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file, for fingerprints.

    Raises:
        DataError: one is gone.
    """
    found = []
    for file in files:
        try:
            status = (folder / file).stat()
        except OSError as error:
            raise DataError(f"image {folder / file} cannot be read: {error.strerror}; restore it") from None
        found.append((file, status.st_size, status.st_mtime_ns))
    return found


def part_names(items: int, parts: int) -> list[str]:
    """Names of at most `parts` units of work, `part/parts`."""
    count = min(items, parts)
    return [f"{part}/{count}" for part in range(count)]


def part_range(part: str, items: int) -> range:
    """Places of the items of a unit of work, neighbours together."""
    number, count = map(int, part.split("/"))
    return range(items * number // count, items * (number + 1) // count)
