"""Market-1501: people by six cameras."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pydantic import Field

from pipeline.data.protocols import GALLERY, QUERY, SCHEMAS, Protocol
from pipeline.data.sources import Sample, folder_key
from pipeline.data.sources_eval.files import part_names, part_range, read_image, stamps
from pipeline.errors import DataError
from pipeline.schema import Config, digest_json

# Person, camera, sequence, frame, detection; a few names of the release end twice.
NAME = re.compile(r"(-1|\d{4})_c(\d)s(\d)_(\d{6})_(\d{2})(?:\.jpg)+", re.IGNORECASE)
JUNK, DISTRACTOR = "-1", "0000"
TRAIN, TEST_GALLERY, TEST_QUERY = "bounding_box_train", "bounding_box_test", "query"


class Market1501Config(Config):
    """The folder of the release."""

    path: Path = Field(description="The folder that holds bounding_box_train, bounding_box_test and query.")
    parts: int = Field(default=16, ge=1, le=65536, description="Into how many units of work the images are cut.")


@dataclass(frozen=True)
class _Photo:
    """A file beneath the root, and what its name says."""

    file: str
    person: str
    camera: str

    @property
    def identity(self) -> str:
        """The person; a distractor is nobody else's picture, and an identity of its own."""
        return f"distractor-{Path(self.file).name.split('.')[0]}" if self.person == DISTRACTOR else self.person

    @property
    def group(self) -> str:
        """Equal for pictures of one identity by one camera, which the benchmark does not compare."""
        return f"{self.identity}/c{self.camera}"


class _Market1501:
    """Photos of some of the release's folders. Junk (-1) counts neither for nor against a model, and is left out."""

    min_images = 1
    folders: tuple[str, ...]

    def __init__(self, config: Market1501Config) -> None:
        self.config = config
        self.root = config.path.expanduser().resolve()
        photos = [photo for folder in self.folders for photo in _photos(self.root, folder)]
        self._photos = [photo for photo in photos if photo.person != JUNK]

    def fingerprint(self) -> str:
        """Sha256 over each image's path, size and modification time."""
        files = stamps(self.root, (photo.file for photo in self._photos))
        return digest_json({"source": "market1501", "files": files})

    def parts(self) -> list[str]:
        """Runs of images."""
        return part_names(len(self._photos), self.config.parts)

    def read(self, part: str) -> Iterator[Sample]:
        """Yield the images of a part.

        Raises:
            DataError: an image cannot be read.
        """
        for place in part_range(part, len(self._photos)):
            photo = self._photos[place]
            about = {"file": photo.file, "camera": photo.camera, "group": photo.group, **self._role(photo)}
            yield Sample(folder_key(photo.file), read_image(self.root / photo.file), "jpg", photo.identity, about)

    def _role(self, _photo: _Photo) -> dict[str, str]:
        return {}


class Market1501TrainSource(_Market1501):
    """The 751 people to train on.

    Raises:
        DataError: the folder is missing or empty, or a picture's name is not of the release's form.
    """

    name = "market1501-train"
    folders = (TRAIN,)


class Market1501TestSource(_Market1501):
    """The 750 people to test on: queries, a gallery, and distractors in it.

    Pictures of one person by one camera are not compared. The attribute `group` tells it: it is equal for these alone.

    Raises:
        DataError: a folder is missing or empty, or a picture's name is not of the release's form.
    """

    name = "market1501-test"
    folders = (TEST_GALLERY, TEST_QUERY)

    def _role(self, _photo: _Photo) -> dict[str, str]:
        return {"role": QUERY if _photo.file.startswith(f"{TEST_QUERY}/") else GALLERY}

    def protocol(self) -> Protocol:
        """Return the roles."""
        rows = [(folder_key(p.file), self._role(p)["role"], p.identity, p.group) for p in self._photos]
        return Protocol(roles=pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMAS["roles"]))


def _photos(root: Path, folder: str) -> Iterator[_Photo]:
    """Yield the pictures of a folder by name; other files, such as Thumbs.db, are passed over."""
    path = root / folder
    if not path.is_dir():
        raise DataError(f"{path} does not exist; give the folder of Market-1501 that holds {folder}")
    files = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".jpg")
    if not files:
        raise DataError(f"{path} holds no jpg image; unpack Market-1501 again")
    for file in files:
        match = NAME.fullmatch(file)
        if match is None:
            raise DataError(
                f"{path / file}: the name is not of the form 0002_c1s1_000451_03.jpg (person, camera, sequence, frame, "
                "detection); remove it"
            )
        yield _Photo(f"{folder}/{file}", match[1], match[2])
