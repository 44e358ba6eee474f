"""Members of a WebDataset tar."""

from typing import NamedTuple

IMAGES = frozenset({"png", "jpg", "jpeg", "webp"})


class Component(NamedTuple):
    """One member of a tar: its extension, where its bytes begin, how many they are, and its full name."""

    extension: str
    offset: int
    size: int
    name: str
