"""Shards on disk: WebDataset tars with a `wds2idx` index beside each, written and read by offset."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
import numpy.typing as npt
from webdataset import TarWriter

from pipeline.data.sources import KEY_PATTERN, Sample
from pipeline.data.sources.components import IMAGES, Component
from pipeline.errors import DataError
from pipeline.files import parse_json, written_whole

INDEX_VERSION = "v1.2"  # of nvidia.dali's wds2idx
NAME_BYTES = 100  # what a tar header holds of a name


def index_path(tar: Path) -> Path:
    """Where the index of a shard stands."""
    return tar.with_suffix(".idx")


def write_shard(tar: Path, samples: Iterable[Sample], rows: Mapping[str, int]) -> int:
    """Write samples as a WebDataset tar, and its index beside it; both appear whole or not at all.

    A sample is `<key>.<extension>` (the image as it is), `<key>.cls` (its row in the table) and `<key>.json`
    (the identity's key and the attributes). The same samples give the same bytes at any time, on any machine.
    The index is written last: where it stands, the tar is whole.

    Args:
        tar: where the shard shall stand.
        samples: each key once.
        rows: row of each of the samples' identities in the data set's table.

    Returns:
        The number of samples written.
    """
    lines = []
    with written_whole(tar) as stream:
        # The time is an int: a float costs an extended header for each member.
        about = {"user": "bct", "group": "bct", "mode": 0o444, "mtime": 0}
        with TarWriter(stream, encoder=False, compress=False, **about) as writer:
            for sample in samples:
                assert KEY_PATTERN.fullmatch(sample.key), f"{sample.key!r} is no key that is safe in a tar"
                members = _members(sample, rows[sample.identity])
                components = _components(sample.key, members, writer.tarstream.offset)
                writer.write({"__key__": sample.key, **members})
                assert writer.tarstream.offset == _end(components[-1]), "the tar is not laid out as the index says"
                lines.append(index_line(components))
        assert lines, "a shard holds at least one sample: DALI refuses an empty one"
    write_index(tar, lines)
    return len(lines)


def write_index(tar: Path, lines: Sequence[str]) -> None:
    """Write the index of a tar, of one line a sample (`index_line`)."""
    with written_whole(index_path(tar)) as stream:
        stream.write("\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]).encode())


def index_line(components: Iterable[Component]) -> str:
    """One sample's line of the index."""
    return " ".join(f"{one.extension} {one.offset} {one.size} {one.name}" for one in components)


def _members(sample: Sample, row: int) -> dict[str, bytes]:
    """Contents by extension."""
    about = {"identity": sample.identity, **sample.attributes}
    return {
        sample.extension: sample.image,
        "cls": str(row).encode(),
        "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
    }


def _components(key: str, members: dict[str, bytes], offset: int) -> list[Component]:
    """Where the members will stand; TarWriter puts them in the order of their extensions."""
    components = []
    for extension in sorted(members):
        components.append(Component(extension, offset + BLOCKSIZE, len(members[extension]), f"{key}.{extension}"))
        offset = _end(components[-1])
    return components


def _end(component: Component) -> int:
    """Where the tar stands after a member, which is filled up to a whole block."""
    return component.offset + -(-component.size // BLOCKSIZE) * BLOCKSIZE


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a shard stand, and whose they are.

    Attributes:
        offsets: (N,) int64; first byte of each image in the tar.
        sizes: (N,) int64; bytes of each image.
        rows: (N,) int32; row of each image's identity in the data set's table.
    """

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(cls, tar: Path, idx: Path, identities: int | None = None) -> ShardIndex:
        """Parse an index and read every `.cls` in one pass over the tar.

        Each `.cls` is read with the tar header before it, whose name must be the one that the index gives: an
        index of another tar gives wrong labels otherwise, and nobody would know.

        Args:
            tar: the shard.
            idx: its index.
            identities: rows that the table has, to check the labels against; not checked when not given.

        Raises:
            DataError: either file is missing or broken, or they do not belong together; names shard and key.
        """
        samples = list(read_components(tar, idx))
        offsets, sizes = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        rows = np.empty(len(samples), np.int32)
        with _open(tar) as stream:
            for number, (key, components) in enumerate(samples):
                image = _only_image(tar, key, components)
                offsets[number], sizes[number] = image.offset, image.size
                label = _read_member(stream.fileno(), tar, key, components, "cls")
                rows[number] = _row(tar, key, label, np.iinfo(np.int32).max if identities is None else identities)
        return cls(offsets, sizes, rows)


def read_attributes(tar: Path, idx: Path) -> list[tuple[str, dict[str, str]]]:
    """Read (key, attributes) of every sample, in the shard's order; the attributes include `identity`.

    Raises:
        DataError: as `ShardIndex.load`, or a `.json` is missing or no object.
    """
    attributes = []
    with _open(tar) as stream:
        for key, components in read_components(tar, idx):
            text = _read_member(stream.fileno(), tar, key, components, "json")
            try:
                value = parse_json(text)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise DataError(f"shard {tar}: {key}.json is no JSON object; restore the shard or pack again")
            attributes.append((key, {name: str(content) for name, content in value.items()}))
    return attributes


def read_components(tar: Path, idx: Path) -> Iterator[tuple[str, list[Component]]]:
    """Yield (key, components) of every sample that an index lists.

    Raises:
        DataError: tar or index is missing, a line is malformed, or the index points past the end of the tar.
    """
    try:
        end = tar.stat().st_size
        head, *lines = idx.read_text().splitlines() or [""]
    except FileNotFoundError as error:
        raise DataError(f"shard {tar}: {error.filename} is missing; restore it or pack again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"shard {tar}: the shard or its index cannot be read: {error}; pack again") from None
    if head.split() != [INDEX_VERSION, str(len(lines))]:
        raise DataError(
            f"index {idx} is malformed: line 1 is {head[:40]!r} and {len(lines)} lines follow, "
            f"not '{INDEX_VERSION} {len(lines)}'; make it again with wds2idx"
        )
    for number, line in enumerate(lines, start=2):
        components = _parse(line)
        if not components:
            raise DataError(f"index {idx} is malformed at line {number}; make it again with wds2idx")
        key = components[0].name.removesuffix(f".{components[0].extension}")
        if any(component.offset + component.size > end for component in components):
            raise DataError(
                f"shard {tar} is cut off: its index puts {key} past its end at byte {end}; restore it or pack again"
            )
        yield key, components


def _parse(line: str) -> list[Component]:
    """Components of one line, none if it is malformed."""
    words = line.split(" ")
    if len(words) % 4:
        return []
    groups = [words[first : first + 4] for first in range(0, len(words), 4)]
    if not all(_is_count(offset) and _is_count(size) and int(offset) >= BLOCKSIZE for _, offset, size, _ in groups):
        return []
    return [Component(extension, int(offset), int(size), name) for extension, offset, size, name in groups]


def _is_count(word: str) -> bool:
    """Whether a word is a number of bytes that a disk can hold; Python itself refuses those of thousands of digits."""
    return word.isdecimal() and len(word) < 19


def _open(tar: Path) -> Any:
    try:
        return tar.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"shard {tar} cannot be opened: {error.strerror}; restore it or pack again") from None


def _only_image(tar: Path, key: str, components: list[Component]) -> Component:
    images = [component for component in components if component.extension.lower() in IMAGES]
    if len(images) != 1:
        raise DataError(f"shard {tar}: {key} has {len(images)} images (png, jpg, webp), not one; pack again")
    return images[0]


def _read_member(file: int, tar: Path, key: str, components: list[Component], extension: str) -> bytes:
    """Content of the sample's member with that extension, once its header is found to be the right one."""
    member = next((component for component in components if component.extension == extension), None)
    if member is None:
        raise DataError(f"shard {tar}: {key} has no .{extension}; pack again")
    raw = os.pread(file, BLOCKSIZE + member.size, member.offset - BLOCKSIZE)
    found, expected = raw[:NAME_BYTES].rstrip(b"\0"), member.name.encode()
    # A longer name is split over header fields, or stands in a block of its own: then this tells nothing.
    if len(expected) <= NAME_BYTES and found != expected:
        raise DataError(
            f"shard {tar}: its index is not this shard's (no {member.name} at byte {member.offset}); "
            "make it again with wds2idx"
        )
    return raw[BLOCKSIZE:]


def _row(tar: Path, key: str, label: bytes, identities: int) -> int:
    if not label.isdigit() or len(label) > 18 or int(label) >= identities:
        raise DataError(
            f"shard {tar}: {key}.cls is {label[:20]!r}, not a row below {identities}; restore the shard or pack again"
        )
    return int(label)
