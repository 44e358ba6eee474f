"""The spool of packing: accepted samples of one part in one file, to be picked out by place later.

Beside the file of a part stand two Arrow files: what is known of its samples, and its rejects. The first of them
is written last: where it stands, the part is finished, and a pack that was killed goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pydantic import Field

from pipeline.data.checking import ImageLimits, RejectedError, check_image
from pipeline.data.sources import KEY_PATTERN, Reject, Sample, Source
from pipeline.data.sources.base import printable
from pipeline.errors import DataError
from pipeline.files import written_whole

SAMPLES = pa.schema(
    {
        "key": pa.string(),
        "high": pa.uint64(),  # the first 16 bytes of the sha256 that the shuffle sorts by: they stand for the key
        "low": pa.uint64(),
        "identity": pa.string(),
        "offset": pa.int64(),  # in the spool file: the description, and right after it the image
        "about": pa.uint32(),  # bytes of the description
        "image": pa.uint32(),  # bytes of the image
        "width": pa.int32(),
        "height": pa.int32(),
    }
)
REJECTS = pa.schema({"key": pa.string(), "identity": pa.string(), "reason": pa.string()})
NOT_UTF8 = "name is not UTF-8"
ROWS = 4096  # of a batch of an Arrow file


class ReadConfig(ImageLimits):
    """What is taken of a source, whether it is packed or adopted."""

    min_images: int = Field(default=1, ge=1, description="Identities with fewer images that decode are left out.")
    namespace: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Put before every identity, as `namespace:identity`, so that data sets can be joined.",
    )

    def identity(self, key: str) -> str:
        """An identity's key in the table."""
        return key if self.namespace is None else f"{self.namespace}:{key}"


def samples_path(path: Path) -> Path:
    """Where the columns of SAMPLES of a spool file stand; there once the part is finished."""
    return path.with_name(f"{path.name}.samples.arrow")


def rejects_path(path: Path) -> Path:
    """Where the columns of REJECTS of a spool file stand."""
    return path.with_name(f"{path.name}.rejects.arrow")


def spool_part(source: Source, part: str, path: Path, config: ReadConfig, seed: int) -> None:
    """Read a part, decode every image once, and write those that decode to `path`; nothing if that was done.

    Raises:
        DataError: the source cannot be read, or gives a key that is not safe in a tar, or no identity.
    """
    if samples_path(path).exists():
        return
    with (
        written_columns(samples_path(path), SAMPLES) as samples,
        written_columns(rejects_path(path), REJECTS) as rejects,
        written_whole(path) as stream,
    ):
        for sample in source.read(part):
            found = _spool(sample, stream, source.name, config, seed)
            if isinstance(found, Reject):
                rejects.reject(found)
            else:
                samples.add(*found)


def _spool(
    sample: Sample | Reject, stream: BinaryIO, name: str, config: ReadConfig, seed: int
) -> tuple[Any, ...] | Reject:
    """Write one sample, and return its row of SAMPLES; or why it is not one."""
    if isinstance(sample, Reject):
        return Reject(sample.key, config.identity(sample.identity), sample.reason)
    if not KEY_PATTERN.fullmatch(sample.key) or not sample.identity or "\n" in sample.identity:
        raise DataError(
            f"source {name}: sample {sample.key!r} of identity {sample.identity!r} needs an identity of one line "
            "and a key of at most 80 letters, digits, '-' and '_'; mend the source"
        )
    identity = config.identity(sample.identity)
    try:
        checked = check_image(sample.image, config)
        about = json.dumps([sample.key, checked.extension, identity, sample.attributes], ensure_ascii=False).encode()
    except RejectedError as error:
        return Reject(sample.key, identity, str(error))
    except UnicodeEncodeError:
        return Reject(sample.key, identity, NOT_UTF8)
    offset = stream.tell()
    stream.write(about)
    stream.write(sample.image)
    digest = hashlib.sha256(f"pack:{seed}:{sample.key}".encode()).digest()
    high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
    return sample.key, high, low, identity, offset, len(about), len(sample.image), checked.width, checked.height


class _Columns:
    """Rows on their way into an Arrow file."""

    def __init__(self, writer: Any, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._rows: list[tuple[Any, ...]] = []

    def add(self, *row: Any) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) == ROWS:
            self.flush()

    def reject(self, reject: Reject) -> None:
        """Add a row of REJECTS; a name that is not UTF-8 is told in escapes."""
        self.add(printable(reject.key), printable(reject.identity), reject.reason)

    def flush(self) -> None:
        """Write what was added."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(self._schema)
        arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []


@contextmanager
def written_columns(path: Path, schema: pa.Schema) -> Iterator[_Columns]:
    """An Arrow file that appears when the block ends, of the rows that are added."""
    with written_whole(path) as stream, pa.ipc.new_file(stream, schema) as writer:
        columns = _Columns(writer, schema)
        yield columns
        columns.flush()


def read_columns(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """Arrow files one after the other as one table, mapped: only what is looked at is in memory."""
    tables = (pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths)
    return pa.concat_tables([schema.empty_table(), *tables])


def read_spooled(paths: Sequence[Path], files: Sequence[int], spans: Iterable[Sequence[int]]) -> Iterator[Sample]:
    """Yield the samples at `spans` of `paths[files]`, in the order given.

    Args:
        paths: spool files.
        files: (N,) which of the paths each sample is in.
        spans: (N, 3); first byte in the file, bytes of the description, bytes of the image after it.
    """
    opened: dict[int, int] = {}
    try:
        for file, (offset, about_size, image_size) in zip(files, spans, strict=True):
            if file not in opened:
                opened[file] = os.open(paths[file], os.O_RDONLY)
            raw = os.pread(opened[file], about_size + image_size, offset)
            assert len(raw) == about_size + image_size, f"spool file {paths[file]} is shorter than when it was written"
            key, extension, identity, attributes = json.loads(raw[:about_size])
            yield Sample(key, raw[about_size:], extension, identity, attributes)
    finally:
        for number in opened.values():
            os.close(number)
