"""What a search found; for people and other programs as JSON, a line a query, or Parquet, a row a hit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.evaluation.metrics import Float32, Int64
from pipeline.files import write_atomically, written_whole

Objects = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Hits:
    """What queries found, best first; equal scores in the order of their keys.

    An index that found fewer than K pads with score -inf and empty strings.

    Attributes:
        keys_QK: (Q, K) str.
        scores_QK: (Q, K) float32 cosines; in a gallery of several generations those of the older ones are brought to
            the scale of the newest.
        generations_QK: (Q, K) str, the generation that made the vector found.
        identities_QK: (Q, K) str, empty where it is not known.
    """

    keys_QK: Objects
    scores_QK: Float32
    generations_QK: Objects
    identities_QK: Objects

    def __len__(self) -> int:
        return len(self.keys_QK)

    def scaled(self, scale: Callable[[Float32], Float32]) -> Hits:
        """The same, with other scores in the same order."""
        return replace(self, scores_QK=scale(self.scores_QK))

    @classmethod
    def stacked(cls, parts: Sequence[Hits]) -> Hits:
        """Of blocks of queries, one below the other."""
        return cls(*(np.concatenate([getattr(one, field.name) for one in parts]) for field in fields(cls)))

    @classmethod
    def merged(cls, parts: Sequence[Hits], k: int) -> Hits:
        """The best k of what the same queries found in several parts."""
        joined = cls(*(np.hstack([getattr(one, field.name) for one in parts]) for field in fields(cls)))
        order_QK = by_score_then_key(joined.scores_QK, joined.keys_QK, k)
        return cls(*(np.take_along_axis(getattr(joined, field.name), order_QK, axis=1) for field in fields(cls)))


def by_score_then_key(scores_QM: Float32, keys_QM: Objects, k: int) -> Int64:
    """(Q, min(k, M)) places of the highest scores of each row, equal ones in the order of their keys."""
    rank = pc.rank(pa.array(keys_QM.ravel(), pa.large_string()), tiebreaker="dense")
    rank_QM = rank.to_numpy().astype(np.int64).reshape(keys_QM.shape)
    order_QM: Int64 = np.lexsort((rank_QM, -scores_QM), axis=1)
    return order_QM[:, :k]


def json_lines(keys: pa.Array, hits: Hits) -> Iterator[str]:
    """`{"query": KEY, "hits": [{"key": ..., "score": ..., "generation": ..., "identity": ...}, ...]}` a query."""
    for place, key in enumerate(keys.to_pylist()):
        row = (hits.keys_QK, hits.scores_QK, hits.generations_QK, hits.identities_QK)
        found = [
            {"key": item, "score": round(float(score), 7), "generation": generation, "identity": identity or None}
            for item, score, generation, identity in zip(*(column[place] for column in row), strict=True)
            if score > -np.inf
        ]
        yield json.dumps({"query": key, "hits": found}, ensure_ascii=False)


def print_hits(keys: pa.Array, hits: Hits) -> None:
    """Print JSON lines."""
    for line in json_lines(keys, hits):
        print(line)


def write_hits(path: Path, keys: pa.Array, hits: Hits) -> None:
    """Write `.json` (lines) or `.parquet` (query, rank from 1, key, identity, score, generation); whole or not at all.

    Args:
        path: of the file.
        keys: (Q,) strings, of the queries.
        hits: of them.
    """
    if path.suffix == ".json":
        write_atomically(path, "".join(line + "\n" for line in json_lines(keys, hits)).encode())
        return
    query_P, rank_P = np.nonzero(hits.scores_QK > -np.inf)
    table = pa.table(
        {
            "query": keys.take(pa.array(query_P)),
            "rank": pa.array(rank_P + 1, pa.int32()),
            "key": pa.array(hits.keys_QK[query_P, rank_P], pa.large_string()),
            "identity": pa.array(hits.identities_QK[query_P, rank_P], pa.large_string()),
            "score": pa.array(hits.scores_QK[query_P, rank_P]),
            "generation": pa.array(hits.generations_QK[query_P, rank_P], pa.large_string()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        pq.write_table(table, stream)
