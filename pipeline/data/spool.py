"""The spool of packing: accepted samples of one part in one file, to be picked out by place later."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.checking import RejectedError, check_image
from pipeline.data.sources import KEY_PATTERN, Reject, Sample, Source
from pipeline.errors import DataError


@dataclass(frozen=True)
class Spooled:
    """What one part gave.

    Attributes:
        path: the spool file.
        keys: of the N accepted samples.
        identities: of the accepted samples.
        spans: (N, 3) int64; first byte in the file, bytes of the description, bytes of the image after it.
        rejects: the images that were not accepted.
    """

    path: Path
    keys: list[str]
    identities: list[str]
    spans: npt.NDArray[np.int64]
    rejects: list[Reject] = field(default_factory=list)


def spool_part(source: Source, part: str, path: Path) -> Spooled:
    """Read a part, decode every image once, and write those that decode to `path`.

    Raises:
        DataError: the source cannot be read, or gives a key that is not safe in a tar, or no identity.
    """
    keys: list[str] = []
    identities: list[str] = []
    spans: list[tuple[int, int, int]] = []
    rejects: list[Reject] = []
    # A task that Ray runs a second time must not meet the file of the first.
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as stream:
        for sample in source.read(part):
            if isinstance(sample, Reject):
                rejects.append(sample)
                continue
            if not KEY_PATTERN.fullmatch(sample.key) or not sample.identity:
                raise DataError(
                    f"source {source.name}: sample {sample.key!r} of identity {sample.identity!r} needs an identity "
                    "and a key of at most 80 letters, digits, '-' and '_'; mend the source"
                )
            try:
                extension = check_image(sample.image)
            except RejectedError as error:
                rejects.append(Reject(sample.key, sample.identity, str(error)))
                continue
            about = json.dumps([sample.key, extension, sample.identity, sample.attributes]).encode()
            spans.append((stream.tell(), len(about), len(sample.image)))
            stream.write(about + sample.image)
            keys.append(sample.key)
            identities.append(sample.identity)
    beside.replace(path)
    return Spooled(path, keys, identities, np.array(spans, np.int64).reshape(-1, 3), rejects)


def read_spooled(paths: Sequence[Path], files: Sequence[int], spans: Iterable[Sequence[int]]) -> Iterable[Sample]:
    """Yield the samples at `spans` of `paths[files]`, in the order given.

    Args:
        paths: spool files.
        files: (N,) which of the paths each sample is in.
        spans: (N, 3), as `Spooled.spans`.
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
