"""Is a new generation compatible with an old one, and how much of the upgrade does it deliver?

M(query generation, gallery generation) is a figure where the queries are embedded by one model and the gallery
by another. Terms and definitions follow Shen et al., "Towards Backward-Compatible Representation Learning",
CVPR 2020: self-test M(g, g), cross-test M(new, old), the empirical compatibility criterion, the paragon (the
new model trained without regard to the old one) and the update gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pipeline.errors import GenerationError
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Float32, Int64
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.evaluation.verification import verification
from pipeline.model.maps import Direction

__all__ = ["Embeddings", "EvaluationConfig"]

LEAST_TAIL = 1 << 17  # impostors whose scores are kept where the FARs need fewer
SLACK = 2  # a replicate's threshold may lie lower than that of all identities


@dataclass(frozen=True)
class Mapped:
    """What a learned map between a generation's space and an older one's gives for the test images.

    Attributes:
        direction: "query": `vectors_ND` are the generation's own embeddings in the older space, (N, D_old); "gallery":
            they are the older generation's in its own space, (N, D).
        vectors_ND: float32, any norm.
    """

    direction: Direction
    vectors_ND: Float32


@dataclass(frozen=True)
class Embeddings:
    """The test images as one generation embeds them.

    Attributes:
        vectors_ND: (N, D) float32, any norm.
        identity_N: (N,) int64 rows of one identity table.
        group_N: (N,) int64 codes of the typeface (or camera): pairs within one are not compared.
        is_gallery_N: (N,) bool, true for the enrolled images, false for the queries.
        generation: name of the model.
        mapped: by the name of an older generation, what the map between the two gives, if one was learned.

    Raises:
        DataError: there is no image, or an embedding is not finite or all zeros; the message names the row.
    """

    vectors_ND: Float32
    identity_N: Int64
    group_N: Int64
    is_gallery_N: npt.NDArray[np.bool_]
    generation: str
    mapped: Mapping[str, Mapped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.vectors_ND)
        for name in ("identity_N", "group_N", "is_gallery_N"):
            assert getattr(self, name).shape == (count,), (
                f"{name} has shape {getattr(self, name).shape}, not ({count},)"
            )
        assert self.is_gallery_N.dtype == np.bool_
        metrics.unit_rows(self.vectors_ND, f"generation {self.generation}:")


def comparable_query(query: Embeddings, gallery: Embeddings) -> Float32:
    """Return the query vectors as they are compared with `comparable_gallery`; cosines renormalise them.

    They are mapped, or whole, if the query's generation has learned a map to the gallery's space, or from it. Without
    one, a new generation with more dimensions is compared by its leading D_old values, as in Shen et al. 2020 for
    an update that enlarges the embedding.

    Raises:
        GenerationError: the query has no map and fewer dimensions than the gallery.
    """
    if (mapped := query.mapped.get(gallery.generation)) is not None:
        return mapped.vectors_ND if mapped.direction == "query" else query.vectors_ND
    query_dim, gallery_dim = query.vectors_ND.shape[1], gallery.vectors_ND.shape[1]
    if query_dim < gallery_dim:
        raise GenerationError(
            f"queries of {query.generation} have {query_dim} dimensions, the gallery of {gallery.generation} has "
            f"{gallery_dim}: only a generation with at least as many dimensions can search it"
        )
    return query.vectors_ND[:, :gallery_dim]


def comparable_gallery(query: Embeddings, gallery: Embeddings) -> Embeddings:
    """Return the gallery in the space in which the query searches it: its own, unless the query has a map from it."""
    mapped = query.mapped.get(gallery.generation)
    if mapped is None or mapped.direction == "query":
        return gallery
    return replace(gallery, vectors_ND=mapped.vectors_ND, mapped={})


def compared_scores(
    query: Embeddings, gallery: Embeddings, far: Sequence[float] = (), identity_N: Int64 | None = None
) -> metrics.VerificationScores:
    """Score all ordered pairs (i by query's model, j by gallery's), i != j, of different groups, both roles.

    The kept tail is long enough for every FAR in `far`, and for replicates of it.

    Args:
        query: all test images as the searching generation embeds them.
        gallery: the same images in the same order as the searched generation embeds them.
        far: false accept rates that will be asked for.
        identity_N: (N,) what stands for each image's identity in the scores; None: its row in the table.

    Raises:
        DataError: no genuine or no impostor pair is left.
        GenerationError: the query has fewer dimensions than the gallery.
    """
    assert_same_images(query, gallery)
    identity_N = query.identity_N if identity_N is None else identity_N
    pairs = len(identity_N) ** 2
    return verification(
        gallery.vectors_ND if query is gallery else comparable_query(query, gallery),
        identity_N,
        comparable_gallery(query, gallery).vectors_ND,
        identity_N,
        query_group_Q=query.group_N,
        gallery_group_G=gallery.group_N,
        same_images=True,
        tail=max([LEAST_TAIL, *(min(pairs, SLACK * metrics.allowed(rate, pairs) + 2) for rate in far)]),
    )


def assert_same_images(query: Embeddings, gallery: Embeddings) -> None:
    """Both generations embed the same images in the same order."""
    for name in ("identity_N", "group_N", "is_gallery_N"):
        assert np.array_equal(getattr(query, name), getattr(gallery, name)), (
            f"{query.generation} and {gallery.generation} do not hold the same images in the same order ({name})"
        )


def criterion(cross: Mapping[str, float], old_self: Mapping[str, float]) -> bool:
    """Empirical compatibility criterion: M(new, old) > M(old, old), strictly, on every metric given.

    Source: Shen et al. 2020, Eq. 3. A metric that is NaN on either side fails.
    """
    assert cross, "no metric to judge compatibility by"
    assert cross.keys() == old_self.keys(), f"metrics differ: {sorted(cross)} and {sorted(old_self)}"
    return all(cross[name] > old_self[name] for name in cross)


def update_gain(cross: float, old: float, paragon: float) -> float | None:
    """Share of the paragon's improvement that queries get with no backfill, on one metric.

    (M(new, old) - M(old, old)) / (M(paragon, paragon) - M(old, old)); may exceed 1.
    None where the criterion does not hold on this metric or the paragon is no better than the old model.
    Source: Shen et al. 2020, Eq. 9.
    """
    if not cross > old or not paragon > old:
        return None
    return (cross - old) / (paragon - old)


def average_compatibility(values: Mapping[tuple[str, str], float], generations: Sequence[str]) -> float | None:
    """Share of all (newer, older) generations of which the newer searches the older's gallery better than itself.

    2 / (T (T - 1)) times the number of pairs i > j with M[i][j] > M[j][j]; a pair that cannot be compared counts as
    one that is not compatible. None for a single generation. Source: Biondi et al., "CoReS: Compatible Representations
    via Stationarity", TPAMI 2023: average compatibility (AC).

    Args:
        values: (query, gallery) -> M on one metric.
        generations: names, oldest first.
    """
    pairs = [(new, old) for place, new in enumerate(generations) for old in generations[:place]]
    if not pairs:
        return None
    return sum(values.get(pair, -np.inf) > values[pair[1], pair[1]] for pair in pairs) / len(pairs)
