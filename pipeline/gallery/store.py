"""A gallery on disk: immutable parts, and one small file that says which of them count.

    gallery.json            what the gallery is: its parts in order, their stamps and digests
    parts/00001.parquet     keys and identities of a part, its stamp in the metadata
    parts/00001.faiss       its vectors, of length 1, in a FAISS index; rows as in the Parquet
    .lock                   held by whoever changes the gallery

**A key belongs to the last part that has it.** So a batch of a backfill is one new part and one replaced
`gallery.json`: a reader sees every key exactly once, before and after, whenever the writer dies. Going back is the same
swap the other way, since no part is changed or deleted until the backfill is closed.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from pydantic import Field

from pipeline.embedding_files import IDENTITY, KEY, EmbeddingFile
from pipeline.errors import DataError
from pipeline.files import file_sha256, parse_json, write_json, written_whole
from pipeline.gallery.index import IndexConfig, Segment, faiss
from pipeline.schema import Config, digest_json
from pipeline.stamp import STAMP, Stamp
from pipeline.vectors import read_stamp

DIGEST = "digest"
_READING = threading.Lock()  # FAISS's limits are the process's


class Part(Config):
    """Two files of one generation's vectors, as they were written."""

    name: str = Field(pattern=r"^\d{5,}$", description="of the files in parts/")
    stamp: Stamp
    rows: int = Field(gt=0)
    keys_sha256: str
    index_sha256: str


class GalleryRecord(Config):
    """What `gallery.json` says."""

    format: Literal[1] = 1
    index: IndexConfig
    parts: tuple[Part, ...] = Field(min_length=1, description="a key belongs to the last part that has it")
    base: int | None = Field(
        None, gt=0, description="parts that stood before the backfill that is open; none: none is open"
    )


class GalleryFolder:
    """The files of a gallery.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file = path / "gallery.json"
        self.parts = path / "parts"

    def read(self) -> GalleryRecord:
        """Read what the gallery is.

        Raises:
            DataError: there is none, or its record cannot be read or was changed by hand.
        """
        try:
            text = self.record_file.read_bytes()
        except OSError:
            raise DataError(f"{self.path} holds no gallery (gallery.json); build one (jobs/search.py build)") from None
        try:
            value = parse_json(text)
            if not isinstance(value, dict):
                raise ValueError("it is no object")
            digest = value.pop(DIGEST, None)
            record = GalleryRecord.model_validate(value)
        except ValueError as error:  # pydantic's and json's are of this class
            told = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else error
            raise DataError(f"{self.record_file} cannot be read ({told}); restore it or build again") from None
        if digest != digest_json(value):
            raise DataError(f"{self.record_file} was changed since it was written; restore it or build again")
        return record

    def commit(self, record: GalleryRecord) -> None:
        """Make a record the gallery's, in one step: the parts that it names are on disk."""
        value = record.model_dump(mode="json")
        write_json(self.record_file, value | {DIGEST: digest_json(value)})

    @contextmanager
    def locked(self, new: bool = False) -> Iterator[None]:
        """Be the only one who changes the gallery; a process that dies lets go.

        Args:
            new: there need not be one yet.

        Raises:
            DataError: there is none, or another process changes it.
        """
        if not new:
            self.read()
        self.parts.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self.path}: another process changes this gallery; wait until it is done") from None
            self._sweep()
            yield

    def write(self, segment: Segment) -> Part:
        """Write a part, which is not the gallery's before a record that names it is committed."""
        assert segment.live == len(segment.keys), "a part is written with all its rows"
        name = f"{1 + max((int(file.stem) for file in self.parts.glob('*.*') if file.stem.isdigit()), default=0):05d}"
        table = pa.table({KEY: segment.keys, IDENTITY: segment.identities})
        with written_whole(self._keys(name)) as stream:
            pq.write_table(table.replace_schema_metadata({STAMP: segment.stamp.model_dump_json()}), stream)
        with written_whole(self._index(name)) as stream:
            faiss.write_index(segment.index, faiss.PyCallbackIOWriter(stream.write))
        return Part(
            name=name,
            stamp=segment.stamp,
            rows=len(segment.keys),
            keys_sha256=file_sha256(self._keys(name)),
            index_sha256=file_sha256(self._index(name)),
        )

    def segment(self, part: Part, config: IndexConfig) -> Segment:
        """Read a part, all its rows live.

        Raises:
            DataError: a file of it is missing, cut or changed, or its stamp is another one than the gallery's record
                says.
        """
        keys, index = self._keys(part.name), self._index(part.name)
        for path, digest in ((keys, part.keys_sha256), (index, part.index_sha256)):
            _verify(path, digest)
        if (stamp := read_stamp(keys)) != part.stamp:
            raise DataError(
                f"{keys} is stamped by generation {stamp.generation!r} ({stamp.digest[:12]}), {self.record_file} says "
                f"{part.stamp.generation!r} ({part.stamp.digest[:12]}); build the gallery again"
            )
        file = EmbeddingFile(keys)
        vectors = _read_index(index, config)
        if (file.rows, vectors.ntotal, vectors.d) != (part.rows, part.rows, stamp.dim):
            raise DataError(
                f"{index} holds {vectors.ntotal} vectors of {vectors.d} values, {keys} {file.rows} keys, not the "
                f"{part.rows} of {stamp.dim} values of {self.record_file}; build the gallery again"
            )
        live_N = np.ones(part.rows, np.bool_)
        return Segment(stamp, file.strings(KEY), file.strings(IDENTITY), vectors, config, live_N)

    def _sweep(self) -> None:
        """Delete what no record names: left by a writer that died, or by one that gave up the way back."""
        names = {part.name for part in self.read().parts} if self.record_file.exists() else set()
        for file in self.parts.iterdir():
            if file.stem not in names:
                file.unlink()

    def swap(self, record: GalleryRecord) -> None:
        """Commit a record that names fewer parts, and delete the others."""
        self.commit(record)
        self._sweep()

    def _keys(self, name: str) -> Path:
        return self.parts / f"{name}.parquet"

    def _index(self, name: str) -> Path:
        return self.parts / f"{name}.faiss"


def _read_index(path: Path, config: IndexConfig) -> Any:
    """Read a FAISS index as if anybody had sent it.

    It claims no more than its file can hold, and maps no file but one that lies beside it: FAISS's indices may name
    others anywhere on the disk.

    Raises:
        DataError: it is none, or not of the kind that the gallery has.
    """
    kinds = {"flat": faiss.IndexFlat, "ivf": faiss.IndexIVFFlat, "hnsw": faiss.IndexHNSWFlat}
    try:
        with _READING:
            size = path.stat().st_size
            faiss.set_deserialization_vector_byte_limit(2 * size)  # as much again for how FAISS counts
            faiss.set_deserialization_loop_limit(size)
            index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR)
    except (RuntimeError, MemoryError, OSError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[-200:]}); build again") from None
    if not isinstance(index, kinds[config.kind]):
        raise DataError(
            f"{path} is a {type(index).__name__}, no index of kind {config.kind!r}; build the gallery again"
        )
    return index


def _verify(path: Path, digest: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it or build the gallery again") from None
    if found != digest:
        raise DataError(
            f"{path} is not the file that was written (sha256 {found[:12]}, not {digest[:12]}): it was cut or changed; "
            "restore it or build the gallery again"
        )
