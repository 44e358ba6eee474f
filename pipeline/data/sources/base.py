"""What packing reads: samples, rejects and the protocol of a source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")  # safe in a tar header, in DALI's index and in WebDataset


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it comes from a source.

    Attributes:
        key: unique in the data set; letters, digits, `-` and `_`, at most 80.
        image: the encoded image, as it will stand in the shard.
        extension: png, jpg or webp; packing sets it by the content.
        identity: key of the identity.
        attributes: anything evaluation wants to know, such as the typeface or the role.
    """

    key: str
    image: bytes
    extension: str
    identity: str
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    """An image that is not packed, and why; the reason is one of few, since rejects are counted by it."""

    key: str
    identity: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """A data set before packing, in parts that can be read independently; it travels to workers by pickle."""

    @property
    def name(self) -> str:
        """Name of the data set, for messages and the manifest."""
        ...

    @property
    def min_images(self) -> int:
        """Identities with fewer images than this in the whole source are not part of it; packing drops them."""
        ...

    def fingerprint(self) -> str:
        """Sha256 (hex) over all that determines the samples, by which a finished pack is recognised."""
        ...

    def parts(self) -> list[str]:
        """Names of the independent units of work."""
        ...

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Yield the samples of one part, and what the source itself refuses, always in the same order."""
        ...


def printable(text: str) -> str:
    """A name with what is not UTF-8 in it as escapes; other names as they are."""
    return text.encode("utf-8", "backslashreplace").decode()


def folder_key(relative: str) -> str:
    """Return a sample key for a file: its readable path, and enough of the path's sha256 to make it unique."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", relative.rpartition(".")[0]).strip("-")[-48:]
    return f"{readable}-{hashlib.sha256(relative.encode(errors='surrogateescape')).hexdigest()[:20]}".lstrip("-")
