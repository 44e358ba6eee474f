"""Which vectors of a gallery are embedded again first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from pydantic import Field, model_validator

from pipeline.errors import DataError
from pipeline.evaluation.exact import blocks
from pipeline.evaluation.metrics import Float32, Float64, Int64
from pipeline.gallery.hits import Hits, Objects
from pipeline.gallery.index import Bools, Segment
from pipeline.parquet import read_parquet
from pipeline.schema import Config
from pipeline.search import Gallery, search_segments
from pipeline.stamp import Stamp

KEY, COUNT = "key", "count"
FIRST, WIDEN = 8, 4  # hits looked at, and how many times more where all of them are mates
ITEMS = 1 << 12  # items whose neighbours are looked up at a time


class OrderConfig(Config):
    """The order of a backfill: what pays first comes first."""

    order: Literal["uncertainty", "traffic", "random"] = Field(
        "uncertainty",
        description="uncertainty: items that are most easily taken for another identity; traffic: those found most "
        "often; random: the baseline",
    )
    traffic: Path | None = Field(None, description="CSV or Parquet of key and count, for the order traffic")
    seed: int = Field(0, ge=0, description="of the random order")

    @model_validator(mode="after")
    def _traffic_has_its_file(self) -> OrderConfig:
        if (self.order == "traffic") != (self.traffic is not None):
            raise ValueError("the order 'traffic' and a file of counts go together (--order traffic --traffic FILE)")
        return self


def keys_in_order(gallery: Gallery, new: Stamp, config: OrderConfig) -> pa.Array:
    """The keys of a gallery that are not the new generation's yet, those that pay first first.

    Equal ones stay in the gallery's order.

    Args:
        gallery: as it was before the backfill, so that a run that goes on finds the same order.
        new: stamp of the generation that embeds it again.
        config: which order.

    Raises:
        DataError: the file of counts is missing or cannot be used.
    """
    due = [segment for segment in gallery.segments if segment.live and segment.stamp.digest != new.digest]
    keys = Gallery(tuple(due), gallery.config).keys()
    if not len(keys):
        return keys
    match config.order:
        case "uncertainty":
            places = np.argsort(-np.concatenate([ambiguity(segment, due) for segment in due]), kind="stable")
        case "traffic":
            assert config.traffic is not None, "checked by the config"
            places = np.argsort(-counts_of(config.traffic, keys), kind="stable")
        case "random":
            places = np.random.default_rng([config.seed, len(keys)]).permutation(len(keys))
    return keys.take(pa.array(places))


def ambiguity(segment: Segment, due: Sequence[Segment]) -> Float32:
    """(N,) how easily each live item of a segment is taken for another identity, from the gallery alone.

    It is the cosine to the nearest item of another identity among the items of the same generation: the larger, the
    smaller the margin that is left to a query. `evaluation.backfill.ambiguity` is the same; this one asks the
    gallery's index, and so misses what that misses. An item whose identity is not known is taken for the only one of
    its identity: right for one image a product; a gallery of many unnamed images an identity ranks by its duplicates.
    """
    alike = [one for one in due if one.stamp == segment.stamp]
    rows_N = np.flatnonzero(segment.live_N)
    keys_N, identities_N = (
        column.take(pa.array(rows_N)).to_numpy(zero_copy_only=False) for column in (segment.keys, segment.identities)
    )
    other_N = np.empty(len(rows_N), np.float32)
    for block in blocks(len(rows_N), ITEMS):
        unit_qD = segment.unit(rows_N[block])

        def find(place_q: Int64, k: int, unit_qD: Float32 = unit_qD) -> Hits:
            return search_segments(alike, unit_qD[place_q], k)

        other_N[block] = best_scores(find, keys_N[block], identities_N[block], sum(one.live for one in alike))[1]
    return other_N


def best_scores(
    find: Callable[[Int64, int], Hits], keys_Q: Objects, identities_Q: Objects, items: int
) -> tuple[Float32, Float32]:
    """The highest scores of a mate and of an item of another identity; a query's own key is left out.

    Args:
        find: the best k items of some of the queries, by place.
        keys_Q: (Q,) str.
        identities_Q: (Q,) str; an empty one has no mates.
        items: how many can be found.

    Returns:
        (Q,) of the mates that stand before every item of another identity or beside the first, -inf without one; and
        (Q,) of the items of other identities, -inf without one.
    """
    mate_Q, other_Q = np.full((2, len(keys_Q)), -np.inf, np.float32)
    open_q, k = np.arange(len(keys_Q)), FIRST
    while len(open_q):
        hits = find(open_q, min(k, items))
        there_qK = hits.scores_QK > -np.inf
        own_qK = hits.keys_QK == keys_Q[open_q, None]
        same_qK = (hits.identities_QK == identities_Q[open_q, None]) & (identities_Q[open_q, None] != "")
        is_other_qK = there_qK & ~own_qK & ~same_qK
        mate_Q[open_q] = _highest(hits.scores_QK, same_qK & ~own_qK)
        other_Q[open_q] = _highest(hits.scores_QK, is_other_qK)
        if k >= items:
            break
        open_q = open_q[there_qK[:, -1] & ~is_other_qK.any(axis=1)]
        k *= WIDEN
    return mate_Q, other_Q


def _highest(scores_QK: Float32, which_QK: Bools) -> Float32:
    highest_Q: Float32 = np.where(which_QK, scores_QK, np.float32(-np.inf)).max(axis=1)
    return highest_Q


def counts_of(path: Path, keys: pa.Array) -> Float64:
    """(N,) how often each key was found, by a file of counts; 0 where it has none, the sum where it has several.

    Args:
        path: a `.csv` with a header, or Parquet; columns `key` and `count`. Keys that are not asked for are left out.
        keys: (N,) large strings.

    Raises:
        DataError: the file is missing or cannot be read, lacks a column, or a count is no number or below 0.
    """
    try:
        if path.suffix.lower() == ".csv":
            # Keys like 007 stay strings.
            convert = pyarrow.csv.ConvertOptions(column_types={KEY: pa.large_string(), COUNT: pa.float64()})
            table = pyarrow.csv.read_csv(path, convert_options=convert)
        else:
            table = read_parquet(path)
        for column in (KEY, COUNT):
            if column not in table.column_names:
                raise DataError(f"{path} has no column {column!r}, but {', '.join(map(repr, table.column_names))}")
        table = table.select([KEY, COUNT]).cast(pa.schema({KEY: pa.large_string(), COUNT: pa.float64()}))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no counts can be read from it: {' '.join(str(error).split())}") from None
    counts = table.column(COUNT).to_numpy()
    if not (counts >= 0).all():
        wrong = table.column(KEY)[int(np.argmin(counts >= 0))].as_py()
        raise DataError(f"{path}: the count of key {wrong!r} is no number of at least 0")
    place = pc.index_in(table.column(KEY).combine_chunks(), value_set=keys)
    known = place.is_valid().to_numpy(zero_copy_only=False)
    total_N = np.bincount(place.drop_null().to_numpy(), weights=counts[known], minlength=len(keys))
    return total_N.astype(np.float64)
