"""Where samples come from: one file a source, and the protocol that they follow in `base`."""

from pipeline.data.sources.base import EXTENSIONS, KEY_PATTERN, Reject, Sample, Source, folder_key
from pipeline.data.sources.folder import FolderSource, FolderSourceConfig
from pipeline.data.sources.listing import ListSource, ListSourceConfig
from pipeline.data.sources.recordio import RecordSource, RecordSourceConfig
from pipeline.data.sources.webdataset import WebDatasetConfig, WebDatasetSource

__all__ = [
    "EXTENSIONS",
    "KEY_PATTERN",
    "FolderSource",
    "FolderSourceConfig",
    "ListSource",
    "ListSourceConfig",
    "RecordSource",
    "RecordSourceConfig",
    "Reject",
    "Sample",
    "Source",
    "WebDatasetConfig",
    "WebDatasetSource",
    "folder_key",
]
