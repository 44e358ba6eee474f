"""A folder with one folder of images for each identity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from pipeline.data.sources.base import EXTENSIONS, Sample, folder_key, printable
from pipeline.errors import DataError
from pipeline.schema import Config, digest_json


class FolderSourceConfig(Config):
    """A folder with one folder of images for each identity."""

    path: Path = Field(description="Folder that holds one folder per identity; the folder's name is the identity.")
    parts: int = Field(default=64, ge=1, le=65536, description="Into how many units of work the identities are cut.")


class FolderSource:
    """Images (jpg, jpeg, png, webp) at any depth beneath one folder per identity.

    Files are taken as they are; whether they decode is found out at packing. Hidden files and folders are passed over.

    Raises:
        DataError: the folder is missing, or holds no image beneath a folder.
    """

    min_images = 1

    def __init__(self, config: FolderSourceConfig) -> None:
        self.config = config
        self.root = config.path.expanduser().resolve()
        if not self.root.is_dir():
            raise DataError(f"image folder {self.root} does not exist; give a folder with one folder per identity")
        self._files = {folder.name: files for folder in sorted(self.root.iterdir()) if (files := _images(folder))}
        if not self._files:
            raise DataError(
                f"image folder {self.root} holds no jpg, png or webp image beneath a folder; "
                "put the images of each identity in a folder named after it"
            )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def fingerprint(self) -> str:
        """Sha256 over every image's relative path, size and modification time (not its content: that is slow)."""
        entries = []
        for identity, files in self._files.items():
            for file in files:
                status = (self.root / identity / file).stat()
                entries.append([printable(identity), printable(file), status.st_size, status.st_mtime_ns])
        return digest_json({"source": "folder", "files": entries})

    def parts(self) -> list[str]:
        """Groups of identities, `part/parts`; identities are dealt out in turn, so that groups are alike in size."""
        count = min(self.config.parts, len(self._files))
        return [f"{part}/{count}" for part in range(count)]

    def read(self, part: str) -> Iterator[Sample]:
        """Yield the images of the part's identities, in the order of their paths.

        Raises:
            DataError: an image cannot be read from the disk.
        """
        first, count = map(int, part.split("/"))
        for identity in sorted(self._files)[first::count]:
            for file in self._files[identity]:
                path = self.root / identity / file
                try:
                    image = path.read_bytes()
                except OSError as error:
                    raise DataError(f"image {path} cannot be read: {error.strerror}; mend it or remove it") from None
                key = folder_key(f"{identity}/{file}")
                yield Sample(key, image, EXTENSIONS[path.suffix.lower()], identity, {"file": f"{identity}/{file}"})


def _images(folder: Path) -> list[str]:
    """Relative paths of the images beneath a folder, sorted; none if it is hidden or no folder."""
    if not folder.is_dir() or folder.name.startswith("."):
        return []
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    visible = (path for path in found if not any(piece.startswith(".") for piece in path.parts))
    return sorted(path.as_posix() for path in visible if (folder / path).is_file())
