"""Evaluation sets as sources: images in shards like any other, and a protocol of what is compared."""

from pipeline.data.sources_eval.ijb import IjbSource, IjbSourceConfig
from pipeline.data.sources_eval.insightface_bin import BinSource, BinSourceConfig
from pipeline.data.sources_eval.market1501 import Market1501Config, Market1501TestSource, Market1501TrainSource
from pipeline.data.sources_eval.query_gallery import QueryGalleryConfig, QueryGallerySource

__all__ = [
    "BinSource",
    "BinSourceConfig",
    "IjbSource",
    "IjbSourceConfig",
    "Market1501Config",
    "Market1501TestSource",
    "Market1501TrainSource",
    "QueryGalleryConfig",
    "QueryGallerySource",
]
