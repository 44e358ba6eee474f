"""Parquet that may come from anybody: what its footer claims is looked at before room is made for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# A few bytes can stand for any number of equal rows, but every file here has a key, a path or a vector in each row:
# what is larger than so many times the file is no such table.
ROWS_PER_BYTE = 64
INFLATION = 1024


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file whose footer claims no more than a file of its size can hold; close it, or use it in a `with`.

    Raises:
        pa.ArrowInvalid: it is no Parquet, or claims more.
        OSError: it is missing or cannot be read.
    """
    size = path.stat().st_size
    file = pq.ParquetFile(path)
    about = file.metadata
    bytes_claimed = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    rows = max(about.num_rows, sum(about.row_group(group).num_rows for group in range(about.num_row_groups)))
    if not (0 <= rows <= ROWS_PER_BYTE * size and 0 <= bytes_claimed <= INFLATION * size):
        file.close()
        raise pa.ArrowInvalid(f"its {size:,} bytes claim to hold {rows:,} rows of {bytes_claimed:,} bytes")
    return file


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file, or some columns of it; raises as `open_parquet`."""
    with open_parquet(path) as file:
        return file.read(columns=None if columns is None else list(columns))
