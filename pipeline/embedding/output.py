"""A folder of stamped vectors: a Parquet file a part, and _embed.json, which says what they are of.

    _embed.json            stamp, data and type; at the end also the parts with their counts, and what was not embedded
    part-000000.parquet   of the first part (`pipeline/vectors.py`); none where no image of the part decodes
    .parts/               while it is made: what _embed.json will say of each part

A part's record is written after its file: where both are there and fit, the part is done.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.data.sources import Reject
from pipeline.embedding.parts import Parts
from pipeline.embedding_files import EmbeddingFile
from pipeline.errors import DataError
from pipeline.files import parse_json, write_json
from pipeline.redaction import in_short
from pipeline.schema import Config, digest_json
from pipeline.stamp import Stamp
from pipeline.vectors import Dtype, Vectors, read_stamp, write_vectors

ABOUT, RECORDS, LOCK = "_embed.json", ".parts", ".lock"
ELSE = "choose another --out, or delete that folder if nobody needs it"


class Rejected(Config):
    """An image that has no vector, and why."""

    key: str
    reason: str


class PartRecord(Config):
    """What is known of a part that is done."""

    file: str | None = Field(description="of its vectors; none if there is none")
    part: str = Field(description="its name: a shard's, or that of the source's part")
    samples: int = Field(ge=0, description="images in it, with those that were not embedded")
    rows: int = Field(ge=0, description="vectors")
    bytes: int = Field(ge=0, description="of the file")
    rejects: tuple[Rejected, ...] = ()


class Header(Config):
    """What the vectors of a folder are, and of what."""

    format: int = Field(1, ge=1, le=1, description="of this file; another version of the job may write another")
    stamp: Stamp
    dtype: Dtype
    data: str = Field(description="name of the data set or list")
    data_digest: str = Field(description="of the manifest, or the source's fingerprint")
    parts_digest: str = Field(description="of the parts' names: the same images may be cut in other ways")

    @classmethod
    def of(cls, stamp: Stamp, dtype: Dtype, parts: Parts) -> Header:
        """Of a model's vectors of some parts."""
        return cls(
            stamp=stamp, dtype=dtype, data=parts.name, data_digest=parts.digest, parts_digest=digest_json(parts.names)
        )


class Output:
    """The folder; it travels to the actors by pickle.

    Args:
        folder: absolute; every node must see it under the same path.
        header: what is to be written.
        parts: names of the parts, in order.
    """

    def __init__(self, folder: Path, header: Header, parts: Sequence[str]) -> None:
        assert folder.is_absolute(), "workers run elsewhere"
        self.folder, self.header, self._parts = folder, header, tuple(parts)

    def compare(self) -> dict[str, Any]:
        """Find what an earlier run left, and refuse what is not this run's.

        Returns:
            What _embed.json holds; nothing if there is none.

        Raises:
            DataError: the folder holds vectors of another generation, data, type or cut, or of unknown ones.
        """
        path = self.folder / ABOUT
        if not path.exists():
            if strangers := sorted(self.folder.glob("*.parquet")):
                raise DataError(f"{self.folder} holds {strangers[0].name}, but no {ABOUT} that tells of what; {ELSE}")
            return {}
        try:
            told: dict[str, Any] = parse_json(path.read_bytes())
            theirs = Header.model_validate({name: told[name] for name in Header.model_fields})
        except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's error is a ValueError
            raise DataError(f"{path} cannot be read ({type(error).__name__}); {ELSE}") from None
        self._refuse(theirs)
        return told

    def _refuse(self, theirs: Header) -> None:
        ours = self.header
        for what, one, other in (
            ("generation", _named(theirs.stamp), _named(ours.stamp)),
            ("stamp", theirs.stamp.model_dump_json(), ours.stamp.model_dump_json()),
            ("data", _data(theirs), _data(ours)),
            ("type", theirs.dtype, ours.dtype),
            ("parts", theirs.parts_digest[:12], ours.parts_digest[:12]),
        ):
            if one != other:
                raise DataError(f"{self.folder} holds vectors of {what} {one}, not {other}; {ELSE}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it.

        Raises:
            DataError: another run is at work there, or it cannot be written.
        """
        try:
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            stream = (self.folder / LOCK).open("w")
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written: {error.strerror}; choose another --out") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(f"another run embeds into {self.folder}; wait for it, or end it") from None
            yield

    def begin(self) -> dict[int, PartRecord]:
        """Say what the vectors will be, clear away what a killed run left half, and find the parts that are done.

        Returns:
            Their records by number.
        """
        told = self.compare()
        if not told:
            write_json(self.folder / ABOUT, {**self.header.model_dump(mode="json"), "complete": False})
        for path in (*self.folder.glob(".part-*.tmp"), *(self.folder / RECORDS).glob(".*.tmp")):
            path.unlink(missing_ok=True)
        finished = told.get("parts") or [None] * len(self._parts)
        found = {number: self._find(number, one) for number, one in enumerate(finished)}
        return {number: record for number, record in found.items() if record is not None}

    def file(self, number: int) -> Path:
        """Where the vectors of a part stand."""
        return self.folder / f"part-{number:06d}.parquet"

    def _note(self, number: int) -> Path:
        return self.folder / RECORDS / f"{number:06d}.json"

    def _find(self, number: int, told: object) -> PartRecord | None:
        """The record of a part whose file is there as it was written; None if it is to be embedded."""
        path, note = self.file(number), self._note(number)
        try:
            record = PartRecord.model_validate(parse_json(note.read_bytes()) if note.exists() else told)
            if record.part != self._parts[number]:
                return None
            if not record.rows:
                return None if path.exists() else record
            sound = path.stat().st_size == record.bytes and EmbeddingFile(path).rows == record.rows
            return record if sound and read_stamp(path) == self.header.stamp else None
        except (OSError, ValueError, DataError):
            return None

    def write(self, number: int, vectors: Vectors, rejects: Sequence[Reject]) -> PartRecord:
        """Write a part's vectors, then its record; both appear whole or not at all.

        Raises:
            DataError: the disk does not take them.
        """
        try:
            return self._write(number, vectors, rejects)
        except OSError as error:
            told = error.strerror or in_short(error)
            raise DataError(f"{self.file(number)} cannot be written: {told}; see to the disk, then run again") from None

    def _write(self, number: int, vectors: Vectors, rejects: Sequence[Reject]) -> PartRecord:
        path, rows = self.file(number), len(vectors)
        self._note(number).unlink(missing_ok=True)
        if rows:
            write_vectors(path, vectors, self.header.dtype)
        else:  # a reader would stumble over a file without a row
            path.unlink(missing_ok=True)
        record = PartRecord(
            file=path.name if rows else None,
            part=self._parts[number],
            samples=rows + len(rejects),
            rows=rows,
            bytes=path.stat().st_size if rows else 0,
            rejects=tuple(Rejected(key=one.key, reason=one.reason) for one in rejects),
        )
        write_json(self._note(number), record.model_dump(mode="json"))
        return record

    def finish(self, records: Mapping[int, PartRecord]) -> dict[str, Any]:
        """Write _embed.json as it stays.

        Args:
            records: of all parts, by number.

        Returns:
            What it holds: the header, `complete`, `samples`, `rows`, `rejected` and the records as `parts`.

        Raises:
            DataError: there is no vector at all.
        """
        assert sorted(records) == list(range(len(self._parts))), "every part is done"
        ordered = [records[number] for number in range(len(self._parts))]
        if not sum(record.rows for record in ordered):
            reasons = sorted({one.reason for record in ordered for one in record.rejects})
            raise DataError(f"no image of {self.header.data} was embedded ({'; '.join(reasons)[:200]}); look there")
        told = {
            **self.header.model_dump(mode="json"),
            "complete": True,
            "samples": sum(record.samples for record in ordered),
            "rows": sum(record.rows for record in ordered),
            "rejected": sum(len(record.rejects) for record in ordered),
            "parts": [record.model_dump(mode="json") for record in ordered],
        }
        write_json(self.folder / ABOUT, told)
        shutil.rmtree(self.folder / RECORDS, ignore_errors=True)
        return told


def _named(stamp: Stamp) -> str:
    return f"{stamp.family}/{stamp.generation} ({stamp.digest[:12]})"


def _data(header: Header) -> str:
    return f"{header.data!r} ({header.data_digest[:12]})"
