"""InsightFace's verification sets: `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin` and their like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.data.protocols import SCHEMAS, Protocol
from pipeline.data.sources import Sample
from pipeline.data.sources_eval.files import part_names, part_range
from pipeline.data.sources_eval.pickled import Array, load_pickled
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.schema import Config, digest_json


class BinSourceConfig(Config):
    """A pickled verification set."""

    path: Path = Field(description="The .bin file.")
    parts: int = Field(default=4, ge=1, le=1024, description="Units of work; each reads the whole file.")


class BinSource:
    """Aligned faces in pairs, of which it is known whether they show one person; who it is, is not known.

    A pair's two images share an identity if they show one person, and each has its own if not: one person may be
    several identities, so that only the pairs' table is worth evaluating. Keys are positions in the file: pair p is
    `2p` and `2p + 1`, of six digits.

    The file is a pickle of (2P encoded images, P booleans), from Python 2 or 3.

    Raises:
        DataError: the file is missing, holds anything else, or its two lists do not belong together.
    """

    min_images = 1

    def __init__(self, config: BinSourceConfig) -> None:
        self.config = config
        self.path = config.path.expanduser().resolve()
        _, self._same = _load(self.path)

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return self.path.stem

    def fingerprint(self) -> str:
        """Sha256 over the file's content."""
        return digest_json({"source": "insightface-bin", "file": file_sha256(self.path)})

    def parts(self) -> list[str]:
        """Runs of pairs."""
        return part_names(len(self._same), self.config.parts)

    def read(self, part: str) -> Iterator[Sample]:
        """Yield both images of each of the part's pairs.

        Raises:
            DataError: the file changed.
        """
        images, same = _load(self.path)
        for pair in part_range(part, len(self._same)):
            for place in (2 * pair, 2 * pair + 1):
                identity = f"pair-{pair:06d}" if same[pair] else f"pair-{pair:06d}-{place % 2}"
                yield Sample(_key(place), _image(self.path, place, images[place]), "jpg", identity)

    def protocol(self) -> Protocol:
        """Return the table of pairs."""
        columns = [
            [_key(2 * pair) for pair in range(len(self._same))],
            [_key(2 * pair + 1) for pair in range(len(self._same))],
            self._same,
        ]
        return Protocol(pairs=pa.table(columns, schema=SCHEMAS["pairs"]))


def _key(place: int) -> str:
    return f"{place:06d}"


def _load(path: Path) -> tuple[list[Any], list[bool]]:
    """Return images as they come and the pairs' flags, of lengths that belong together."""
    content = load_pickled(path)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise DataError(f"{path} does not hold two lists, images and booleans; is it a verification set?")
    images, same = (value.tolist() if isinstance(value, Array) else value for value in content)
    if not isinstance(images, list) or not isinstance(same, list | tuple) or not same:
        raise DataError(f"{path} does not hold two lists, images and booleans; is it a verification set?")
    if len(images) != 2 * len(same):
        raise DataError(f"{path} has {len(images)} images for {len(same)} pairs, not two a pair; fetch it again")
    for pair, flag in enumerate(same):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise DataError(f"{path}: pair {pair} (from 0) is marked {flag!r}, neither true nor false; fetch it again")
    return images, [bool(flag) for flag in same]


def _image(path: Path, place: int, value: Any) -> bytes:
    raw = value.raw if isinstance(value, Array) else value
    if not isinstance(raw, bytes | bytearray):
        raise DataError(f"{path}: image {place} (from 0) is of type {type(raw).__name__}, not bytes; fetch it again")
    return bytes(raw)
