"""Where samples come from: one file a source, and the protocol that they follow in `base`."""

from pipeline.data.sources.base import EXTENSIONS, KEY_PATTERN, Reject, Sample, Source, folder_key
from pipeline.data.sources.folder import FolderSource, FolderSourceConfig

__all__ = [
    "EXTENSIONS",
    "KEY_PATTERN",
    "FolderSource",
    "FolderSourceConfig",
    "Reject",
    "Sample",
    "Source",
    "folder_key",
]
