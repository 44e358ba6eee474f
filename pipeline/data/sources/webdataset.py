"""WebDataset tars that others made: to be packed anew, or adopted as they stand (`pipeline.data.adopting`)."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from pydantic import Field

from pipeline.data.sources.base import Reject, Sample, folder_key
from pipeline.data.sources.components import IMAGES, Component
from pipeline.errors import DataError
from pipeline.files import parse_json
from pipeline.redaction import in_short
from pipeline.schema import Config, digest_json

NOT_PLAIN = "link, device or sparse file in the tar"
UNSAFE = "name in the tar is absolute or has `..`"
SPACE = "white space in a name in the tar"
NO_IMAGE = "no image (jpg, png or webp) under the key"
IMAGES_MANY = "more than one image under the key"
NO_LABEL = "no label"
BAD_LABEL = "label is neither text nor a whole number"


class WebDatasetConfig(Config):
    """A folder of WebDataset tars."""

    path: Path = Field(description="Folder with the .tar files, uncompressed.")
    label_key: str | None = Field(default=None, description="Key in .json that holds the identity; else .cls does.")


@dataclass(frozen=True, slots=True)
class TarSample:
    """The members of a tar that have one key.

    Attributes:
        key: the name up to the first dot behind the last slash.
        components: the members.
        refused: why the sample is not taken, None if nothing is wrong with its names and kinds.
    """

    key: str
    components: tuple[Component, ...]
    refused: str | None


class WebDatasetSource:
    """The samples of all tars of a folder; one part is one tar. Nothing is ever extracted to the disk.

    The identity is the text of `.cls` (a number or a name), or a value of `.json`; what else `.json` holds becomes
    attributes. Members without an extension, and hidden ones, are passed over, as WebDataset does.

    Raises:
        DataError: the folder is missing, or has no tar.
    """

    min_images = 1

    def __init__(self, config: WebDatasetConfig) -> None:
        self.config = config
        self.root = config.path.expanduser().resolve()
        if not self.root.is_dir():
            raise DataError(f"folder {self.root} does not exist; give the folder with the tars")
        self._tars = sorted(path.name for path in self.root.glob("*.tar") if path.is_file())
        if not self._tars:
            raise DataError(f"folder {self.root} holds no .tar; give the folder with the tars")

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def fingerprint(self) -> str:
        """Sha256 over the tars' names, sizes and modification times, and where the label stands."""
        tars = [[name, (status := (self.root / name).stat()).st_size, status.st_mtime_ns] for name in self._tars]
        return digest_json({"source": "webdataset", "tars": tars, "label_key": self.config.label_key})

    def parts(self) -> list[str]:
        """The tars' names."""
        return list(self._tars)

    def read(self, part: str) -> Iterator[Sample | Reject]:
        """Yield the samples of one tar, in its order; keys are made of the tar's name and theirs.

        Raises:
            DataError: the tar is broken, or a key stands twice in it.
        """
        tar = self.root / part
        with tar.open("rb") as stream:
            for found in read_tar(tar):
                key = folder_key(f"{tar.stem}/{found.key}.")
                taken = self.take(found, stream.fileno())
                if isinstance(taken, str):
                    yield Reject(key, "", taken)
                    continue
                image, identity = taken
                about = {name: text for name, value in _about(found, stream.fileno()).items() if (text := _text(value))}
                about.pop("identity", None)
                content = os.pread(stream.fileno(), image.size, image.offset)
                yield Sample(key, content, image.extension.lower(), identity, {"file": f"{part}/{found.key}", **about})

    def take(self, found: TarSample, file: int) -> tuple[Component, str] | str:
        """The image of a tar's sample and its identity; or the reason for which it is not taken."""
        if found.refused:
            return found.refused
        images = [one for one in found.components if one.extension.lower() in IMAGES]
        if len(images) != 1:
            return IMAGES_MANY if images else NO_IMAGE
        if self.config.label_key is not None:
            value = _about(found, file).get(self.config.label_key)
            label = _text(value)
            return (images[0], label) if label else (NO_LABEL if value in (None, "") else BAD_LABEL)
        try:
            label = (_content(found, "cls", file) or b"").decode().strip()
        except UnicodeDecodeError:
            return BAD_LABEL
        if "\n" in label:
            return BAD_LABEL
        return (images[0], label) if label else NO_LABEL


def read_tar(tar: Path) -> Iterator[TarSample]:
    """Yield the samples of a tar; members of one key stand one after the other.

    Raises:
        DataError: the tar is broken, cut off or compressed, or a key stands twice in it.
    """
    seen: set[str] = set()
    for key, group in groupby(_members(tar), key=lambda member: member[0]):
        members = list(group)
        components = tuple(component for _, component, _ in members)
        if key in seen or len({one.extension.lower() for one in components}) != len(components):
            raise DataError(f"tar {tar}: key {key!r} stands twice; keys must be unique: mend the tar")
        seen.add(key)
        yield TarSample(key, components, next((refused for _, _, refused in members if refused), None))


def _members(tar: Path) -> Iterator[tuple[str, Component, str | None]]:
    """(key, component, why it is refused) of each member that belongs to a sample."""
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isdir() or not stem or not extension:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                yield key, Component(extension, member.offset_data, member.size, member.name), _refusal(member)
            _check_end(tar, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"tar {tar} is cut off, broken or compressed: {in_short(error)}; fetch it again, or unpack it"
        ) from None


def _refusal(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return NOT_PLAIN
    if path.is_absolute() or ".." in path.parts:
        return UNSAFE
    return SPACE if len(member.name.split()) != 1 else None


def _check_end(tar: Path, offset: int) -> None:
    """Tarfile takes what it cannot read for the end: samples behind it would be lost, and nobody would know."""
    with tar.open("rb") as stream:
        stream.seek(offset)
        rest = stream.read(1 << 20)
        if not rest:
            raise DataError(f"tar {tar} has no mark at its end, byte {offset}: it is cut off; fetch it again")
        while rest:
            if rest.strip(b"\0"):
                raise DataError(f"tar {tar} is broken at byte {offset}: no header and no end there; fetch it again")
            rest = stream.read(1 << 20)


def _content(found: TarSample, extension: str, file: int) -> bytes | None:
    member = next((one for one in found.components if one.extension.lower() == extension), None)
    return None if member is None else os.pread(file, member.size, member.offset)


def _about(found: TarSample, file: int) -> dict[str, object]:
    """What `.json` holds; nothing if there is none or it is no object."""
    try:
        value = parse_json(_content(found, "json", file) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    """A label or attribute as text; empty if it is neither text of one line nor a whole number."""
    if isinstance(value, str):
        return "" if "\n" in value else value.strip()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
