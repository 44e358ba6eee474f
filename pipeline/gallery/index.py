"""One part of a gallery: vectors of one generation behind a FAISS index, some of which another part may have replaced.

FAISS proposes, we score: an item's score is its cosine with the query, summed in float64 and rounded to a multiple of
2^-24 (as in `evaluation.metrics`), and equal scores stand in the order of their keys. So what is found depends neither
on how many queries come at once nor on how a gallery is cut into parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import faiss as _faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.evaluation.exact import Rows, blocks, error_bound
from pipeline.evaluation.metrics import Float32, Float64, Int64, rounded
from pipeline.gallery.hits import Hits, by_score_then_key
from pipeline.schema import Config
from pipeline.stamp import Stamp
from pipeline.vectors import Vectors

faiss: Any = _faiss  # its type stubs lack half of what is used here

Bools = npt.NDArray[np.bool_]

SPARE = 8  # fetched beyond what is asked for, so that ties at the end are seen
WIDEN = 4  # and that many times more where they go on,
MOST_TIED = 1 << 12  # up to this many: beyond, which of equal items come last is FAISS's choice
VALUES = 1 << 22  # of fetched vectors, scored at a time: 32 MiB
POINTS = 39  # a list that k-means makes should have as many vectors to learn from (FAISS warns below)
NOTHING = -1  # FAISS's row where it found fewer than asked for


class IndexConfig(Config):
    """How a gallery is indexed: `flat` looks at every vector, `ivf` and `hnsw` are faster and miss some."""

    kind: Literal["flat", "ivf", "hnsw"] = Field("flat", description="of the FAISS index")
    lists: int | None = Field(
        None, gt=0, description="ivf: lists that the vectors are sorted into; none: 4 sqrt(N) [at most N / 39]"
    )
    probes: int = Field(16, gt=0, description="ivf: lists that a query looks into")
    links: int = Field(32, ge=2, description="hnsw: neighbours that a vector is linked to")
    build_ef: int = Field(80, gt=0, description="hnsw: candidates kept while the graph is built")
    ef: int = Field(64, gt=0, description="hnsw: candidates kept while it is searched")


@dataclass(frozen=True)
class Segment:
    """Vectors of one generation behind a FAISS index.

    Attributes:
        stamp: of all of them.
        keys: (N,) large strings, one a vector.
        identities: (N,) large strings, empty where it is not known.
        index: of N unit vectors, by inner product.
        config: of the index.
        live_N: (N,) bool, false where another part holds the key now.
    """

    stamp: Stamp
    keys: pa.Array
    identities: pa.Array
    index: Any
    config: IndexConfig
    live_N: Bools

    def __post_init__(self) -> None:
        assert self.index.ntotal == len(self.keys) == len(self.identities) == len(self.live_N), "one row a vector"
        assert self.index.d == self.stamp.dim, "the stamp tells the dimension"

    @classmethod
    def of(cls, vectors: Vectors, config: IndexConfig) -> Segment:
        """Index vectors of any length.

        Raises:
            DataError: a vector is not finite, or zero; the message names its row.
        """
        rows = Rows.of(vectors.vectors_ND, f"gallery of {vectors.stamp.generation!r}:")
        unit_ND = np.empty(vectors.vectors_ND.shape, np.float32)
        for block in blocks(len(unit_ND), max(1, VALUES // vectors.stamp.dim)):
            unit_ND[block] = rows[block].unit()
        # What is kept has length 1, whatever came in.
        stamp = vectors.stamp.model_copy(update={"normalised": True})
        return cls(
            stamp, vectors.keys, vectors.identities, _build(unit_ND, config), config, np.ones(len(unit_ND), np.bool_)
        )

    @cached_property
    def live(self) -> int:
        """How many of the vectors are searched."""
        return int(self.live_N.sum())

    def without(self, keys: pa.Array) -> Segment:
        """The same vectors, of which those of some keys are searched no longer."""
        gone_N = pc.is_in(self.keys, value_set=keys).to_numpy(zero_copy_only=False)
        return replace(self, live_N=self.live_N & ~gone_N)

    def whole(self) -> Segment:
        """The same vectors, all of them searched."""
        return replace(self, live_N=np.ones_like(self.live_N))

    def unit(self, rows_K: Int64) -> Float32:
        """(K, D) unit vectors of some rows."""
        unit_KD: Float32 = self.index.reconstruct_batch(rows_K)
        return unit_KD

    def live_vectors(self) -> Vectors:
        """The vectors that are searched; a copy."""
        rows_K = np.flatnonzero(self.live_N)
        places = pa.array(rows_K)
        return Vectors(self.stamp, self.keys.take(places), self.identities.take(places), self.unit(rows_K))

    def search(self, unit_QD: Float64, k: int) -> Hits:
        """Find the k nearest of the vectors that are searched; fewer if there are fewer.

        Args:
            unit_QD: (Q, D) float64 rows of length 1.
            k: at least 1.
        """
        k = min(k, self.live)
        scores_QK = np.full((len(unit_QD), k), -np.inf, np.float32)
        rows_QK = np.full(scores_QK.shape, NOTHING, np.int64)
        open_q, fetch = np.arange(len(unit_QD)), k + SPARE
        while k and len(open_q):
            fetch = min(fetch, self.live)
            tied = []
            for block in blocks(len(open_q), max(1, VALUES // (fetch * self.stamp.dim))):
                place_q = open_q[block]
                scores_QK[place_q], rows_QK[place_q], tied_q = self._nearest(unit_QD[place_q], k, fetch)
                tied.append(place_q[tied_q])
            if fetch == self.live or fetch >= k + MOST_TIED:
                break
            open_q, fetch = np.concatenate(tied), fetch * WIDEN
        return self._hits(scores_QK, rows_QK)

    def _nearest(self, unit_qD: Float64, k: int, fetch: int) -> tuple[Float32, Int64, Bools]:
        """Scores and rows of the k nearest of `fetch` proposed ones, and for which queries more may tie with the last.

        What is not proposed lies at most at the last proposed score, but for FAISS's float32.
        """
        near_qF, rows_qF = self.index.search(unit_qD.astype(np.float32), fetch, params=self._parameters(fetch))
        there_qF = rows_qF != NOTHING
        rows_P = np.where(there_qF, rows_qF, 0).ravel()
        fetched_qFD = self.unit(rows_P).reshape(*rows_qF.shape, -1)
        exact_qF = np.einsum("qfd,qd->qf", fetched_qFD, unit_qD, dtype=np.float64)
        # Their length is 1 to float32 only; with it, two items see each other with the same score.
        exact_qF /= np.sqrt(np.einsum("qfd,qfd->qf", fetched_qFD, fetched_qFD, dtype=np.float64))
        scores_qF = np.where(there_qF, rounded(exact_qF), -np.inf).astype(np.float32)
        keys_qF = self.keys.take(pa.array(rows_P)).to_numpy(zero_copy_only=False).reshape(rows_qF.shape)
        order_qK = by_score_then_key(scores_qF, keys_qF, k)
        scores_qK = np.take_along_axis(scores_qF, order_qK, axis=1)
        tied_q = near_qF[:, -1] + error_bound(self.stamp.dim) >= scores_qK[:, -1]
        return scores_qK, np.take_along_axis(rows_qF, order_qK, axis=1), tied_q & there_qF[:, -1]

    def _hits(self, scores_QK: Float32, rows_QK: Int64) -> Hits:
        places = pa.array(rows_QK.ravel(), mask=rows_QK.ravel() == NOTHING)
        keys_QK, identities_QK = (
            pc.fill_null(column.take(places), "").to_numpy(zero_copy_only=False).reshape(rows_QK.shape)
            for column in (self.keys, self.identities)
        )
        generations_QK = np.where(rows_QK == NOTHING, "", self.stamp.generation).astype(np.object_)
        return Hits(keys_QK, scores_QK, generations_QK, identities_QK)

    @cached_property
    def _selector(self) -> Any:
        if self.live == len(self.live_N):
            return None
        return faiss.IDSelectorBitmap(np.packbits(self.live_N, bitorder="little"))

    def _parameters(self, fetch: int) -> Any:
        # Replaced vectors still stand in lists and graphs: so many more are looked at that as many live ones are.
        more = len(self.live_N) / max(1, self.live)
        match self.config.kind:
            case "flat":
                return faiss.SearchParameters(sel=self._selector)
            case "ivf":
                probes = min(self.index.nlist, math.ceil(self.config.probes * more))
                return faiss.SearchParametersIVF(sel=self._selector, nprobe=probes)
            case "hnsw":
                ef = min(len(self.live_N), math.ceil(max(self.config.ef, fetch) * more))
                return faiss.SearchParametersHNSW(sel=self._selector, efSearch=ef)


def _build(unit_ND: Float32, config: IndexConfig) -> Any:
    count, dim = unit_ND.shape
    match config.kind:
        case "flat":
            index = faiss.IndexFlatIP(dim)
        case "ivf":
            wanted = config.lists or round(4 * math.sqrt(count))
            lists = max(1, min(wanted, count // POINTS))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # a few vectors are no reason to write to stderr
            index.train(unit_ND)
        case "hnsw":
            index = faiss.IndexHNSWFlat(dim, config.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = config.build_ef
    index.add(unit_ND)
    if config.kind == "ivf":
        index.make_direct_map()  # to read vectors back by row
    return index
