"""InsightFace's face sets, such as MS1MV3, Glint360K and WebFace42M: images in an MXNet RecordIO file.

A record is the magic number, a word whose upper 3 bits tell whether it is whole (0) or the first (1), a middle (2)
or the last (3) piece of one, and whose lower 29 bits are the bytes that follow, filled up to 4. The magic number
itself is never stored inside: where an image has it at a multiple of 4, the record is cut and it is left out. The
content begins with a header (flag, label, id, id2); flag > 0 says that so many float labels follow.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from pydantic import Field

from pipeline.data.sources.base import Reject, Sample
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.redaction import in_short
from pipeline.schema import Config, digest_json

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
LENGTH_BITS = 29
WHOLE, FIRST, MIDDLE, LAST = range(4)
HEADER = struct.Struct("<IfQQ")
BAD_LABEL = "label is no whole number of 0 or more"
UNKNOWN_LABEL = "label is beyond the number of identities in `property`"
AGAIN = "fetch it again, or delete the .idx if it is of another .rec"

Ints = npt.NDArray[np.int64]


class RecordSourceConfig(Config):
    """A face set as InsightFace distributes it."""

    path: Path = Field(description="Folder with train.rec, and train.idx and property where there are such; or a .rec.")
    records: int = Field(default=8192, ge=1, description="Records in a unit of work.")


class RecordSource:
    """Images of a RecordIO file; the identity is the label, as text.

    With an .idx beside the .rec the records that it lists are read; without, all of them, numbered as they stand.
    Record 0 of a face set is no image: its labels tell that the images are the records from 1 to before the
    first label; the identities' records behind them are empty, and passed over. (Beyond 2^24 records a float label
    is not exact: there a record with content is an image.) `property`, if it is there, begins with the number of
    identities, and labels are held to it. A .lst is not read: what it says stands in the records.

    Raises:
        DataError: a file is missing, cut off or no RecordIO, or the .idx is not of the .rec.
    """

    min_images = 1

    def __init__(self, config: RecordSourceConfig) -> None:
        self.config = config
        path = config.path.expanduser().resolve()
        self.path = path / "train.rec" if path.is_dir() else path
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist; give the folder with train.rec, or a .rec")
        self._index, self._property = self.path.with_suffix(".idx"), self.path.with_name("property")
        self._identities = _identities(self._property)
        self._places = _places(self.path, self._index)
        with self.path.open("rb") as stream:
            self._images_end = self._read_head(stream.fileno())

    @property
    def name(self) -> str:
        """Name of the folder of a train.rec, or of the .rec."""
        return self.path.parent.name if self.path.name == "train.rec" else self.path.stem

    def fingerprint(self) -> str:
        """Sha256 over the .rec's size and modification time, the .idx and `property`."""
        status = self.path.stat()
        beside = [file_sha256(path) if path.is_file() else None for path in (self._index, self._property)]
        return digest_json({"source": "recordio", "rec": [status.st_size, status.st_mtime_ns], "beside": beside})

    def parts(self) -> list[str]:
        """Ranges of records, as they stand in the file."""
        return [str(start) for start in range(0, len(self._places), self.config.records)]

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Yield the images of one range of records, in the file's order.

        Raises:
            DataError: the file is cut off or changed.
        """
        start = int(part)
        with self.path.open("rb") as stream:
            for number, offset in self._places[start : start + self.config.records].tolist():
                content = read_record(stream.fileno(), offset, self.path, number)
                labels, image = _unpack(content, self.path, number)
                if number == 0 and self._images_end is not None:
                    continue
                if not image and self._images_end is not None and number >= self._images_end:
                    continue
                yield self._sample(f"{self.path.stem}-{number:09d}"[-80:], labels[0], image)

    def _sample(self, key: str, label: float, image: bytes) -> Sample | Reject:
        if not (label.is_integer() and label >= 0):
            return Reject(key, str(label), BAD_LABEL)
        if self._identities is not None and label >= self._identities:
            return Reject(key, str(int(label)), UNKNOWN_LABEL)
        return Sample(key, image, "jpg", str(int(label)))

    def _read_head(self, file: int) -> int | None:
        """Number of the first record behind the images, if record 0 tells it."""
        head = np.flatnonzero(self._places[:, 0] == 0)
        if not len(head):
            return None
        labels, image = _unpack(read_record(file, int(self._places[head[0], 1]), self.path, 0), self.path, 0)
        return int(labels[0]) if len(labels) > 1 and not image else None


def read_record(file: int, offset: int, path: Path, number: int) -> bytes:
    """Content of the record that begins at `offset`, put together if it is in pieces.

    Raises:
        DataError: no record begins there, or the file ends within it.
    """
    pieces: list[bytes] = []
    while True:
        flag, length = _piece(os.pread(file, 8, offset), path, number, offset)
        if (flag in (MIDDLE, LAST)) != bool(pieces):
            raise DataError(f"{path}: record {number} is out of its order at byte {offset}; {AGAIN}")
        piece = os.pread(file, length, offset + 8)
        if len(piece) != length:
            raise DataError(f"{path} is cut off within record {number}; fetch it again")
        pieces.append(piece)
        if flag in (WHOLE, LAST):
            return MAGIC_BYTES.join(pieces)
        offset += _filled(length)


def _piece(head: bytes, path: Path, number: int, offset: int) -> tuple[int, int]:
    """Flag and length of the piece that begins with `head`."""
    if len(head) < 8:
        raise DataError(f"{path} is cut off before record {number} at byte {offset}; {AGAIN}")
    magic, word = struct.unpack("<II", head)
    if magic != MAGIC:
        raise DataError(f"{path}: no record begins at byte {offset}, where record {number} should; {AGAIN}")
    return word >> LENGTH_BITS, word & ((1 << LENGTH_BITS) - 1)


def _filled(length: int) -> int:
    """Bytes from the start of a piece to the next."""
    return 8 + (length + 3) // 4 * 4


def _unpack(content: bytes, path: Path, number: int) -> tuple[tuple[float, ...], bytes]:
    """Labels (at least one) and image."""
    try:
        flag, label, _, _ = HEADER.unpack_from(content)
        if not flag:
            return (label,), content[HEADER.size :]
        return struct.unpack_from(f"<{flag}f", content, HEADER.size), content[HEADER.size + 4 * flag :]
    except struct.error:
        raise DataError(f"{path}: record {number} is too short for its header; is it an image record?") from None


def _places(path: Path, index: Path) -> Ints:
    """(N, 2) number and offset of the records, as they stand in the file."""
    places = _read_index(index) if index.is_file() else _scan(path)
    if not len(places):
        raise DataError(f"{index if index.is_file() else path} has no record; fetch it again")
    return places[np.argsort(places[:, 1], kind="stable")]


def _read_index(path: Path) -> Ints:
    """Parse an .idx: a number, a tab and an offset on each line."""
    kinds = {"number": pa.int64(), "offset": pa.int64()}
    try:
        table = pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(column_names=list(kinds)),
            pa.csv.ParseOptions(delimiter="\t"),
            pa.csv.ConvertOptions(column_types=kinds),
        )
        places = np.stack([table[name].to_numpy() for name in kinds], axis=1)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"index {path} is malformed: {in_short(error)}; fetch it again, or delete it") from None
    if table["number"].null_count or table["offset"].null_count or (places < 0).any():
        raise DataError(f"index {path} has an empty or negative entry; fetch it again, or delete it")
    if len(np.unique(places[:, 0])) != len(places):
        raise DataError(f"index {path} lists a record twice; fetch it again, or delete it")
    return places


def _scan(path: Path) -> Ints:
    """Find the records without an index, by going from one to the next."""
    offsets: list[int] = []
    with path.open("rb") as stream:
        end, offset = os.fstat(stream.fileno()).st_size, 0
        while offset < end:
            flag, length = _piece(os.pread(stream.fileno(), 8, offset), path, len(offsets), offset)
            if flag in (WHOLE, FIRST):
                offsets.append(offset)
            offset += _filled(length)
    if offset != end:
        raise DataError(f"{path} is cut off within record {len(offsets) - 1}; fetch it again")
    return np.stack([np.arange(len(offsets)), np.array(offsets, np.int64)], axis=1)


def _identities(path: Path) -> int | None:
    """Number of identities by `property` (identities, height, width), None if there is none."""
    if not path.is_file():
        return None
    first = path.read_text(errors="replace").split(",")[0].strip()
    if not first.isdecimal() or len(first) > 18:
        raise DataError(
            f"{path} begins with {first[:20]!r}, not the number of identities; fetch it again, or delete it"
        )
    return int(first)
