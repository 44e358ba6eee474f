"""M(query generation, gallery generation): every figure of a pair of generations, with its replicates.

All pairs are measured on the same images with the same draws of identities, so that any difference of two of them has
a paired interval (`bootstrap.difference`, `bootstrap.gain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.evaluation import figures
from pipeline.evaluation.bootstrap import Estimate
from pipeline.evaluation.compatibility import (
    Embeddings,
    assert_same_images,
    comparable_gallery,
    comparable_query,
    compared_scores,
)
from pipeline.evaluation.figures import Bools, Det, Images, Threshold
from pipeline.evaluation.identification import SearchOutcomes
from pipeline.evaluation.settings import EvaluationConfig


@dataclass(frozen=True)
class Measured:
    """One pair of generations.

    Attributes:
        query: the generation whose queries search.
        gallery: the generation whose gallery is searched.
        metrics: figures by name, in the config's order.
        outcomes: what each query found in the whole gallery; None: no rank or mAP was asked for.
        thresholds: by "far@...".
        far_at_old: the false accept rate at the gallery generation's own thresholds, by "far@..."; empty for
            self-tests, and where the gallery's self-test was not measured.
        det: the curve, where it was asked for.
    """

    query: str
    gallery: str
    metrics: dict[str, Estimate]
    outcomes: SearchOutcomes | None
    thresholds: dict[str, Threshold]
    far_at_old: dict[str, Estimate]
    det: Det | None


class Measurements:
    """Measured pairs, by "query/gallery".

    Attributes:
        pairs: as measured, in the order that was asked for.
        images: what they share.
    """

    def __init__(self, pairs: dict[str, Measured], images: Images) -> None:
        self.pairs, self.images = pairs, images

    def __contains__(self, label: object) -> bool:
        return label in self.pairs

    def __getitem__(self, label: str) -> Measured:
        if label not in self.pairs:
            raise DataError(f"pair {label} was not measured; measured are {', '.join(self.pairs)}")
        return self.pairs[label]

    def estimate(self, query: str, gallery: str, metric: str) -> Estimate:
        """M(query, gallery) on one metric.

        Raises:
            DataError: the pair was not measured.
        """
        return self[f"{query}/{gallery}"].metrics[metric]


def measure(
    embedded: Mapping[str, Embeddings],
    pairs: Sequence[tuple[str, str]],
    config: EvaluationConfig,
    det: bool = False,
) -> Measurements:
    """Measure pairs of generations.

    rank-k, mAP and TPIR search the enrolled images with the queries; TAR is over all pairs of different images and
    different groups, in both roles. Replicates weigh queries and pairs by their identities; the gallery stays whole.

    Args:
        embedded: the test images by every generation that `pairs` names; the same images in the same order.
        pairs: (query generation, gallery generation).
        config: which figures.
        det: also DET curves with their bands.

    Raises:
        DataError: no image in one of the roles, or too few pairs or queries for a rate.
        GenerationError: a query has fewer dimensions than its gallery.
    """
    assert pairs, "no pair to measure"
    first = embedded[pairs[0][0]]
    images = Images.of(first, config)
    done: dict[str, Measured] = {}
    # Self-tests first: a cross-test is also looked at with the threshold of the gallery's own.
    for query, gallery in sorted(dict.fromkeys(pairs), key=lambda pair: pair[0] != pair[1]):
        assert_same_images(embedded[query], first)
        assert_same_images(embedded[gallery], first)
        old = done.get(f"{gallery}/{gallery}")
        done[f"{query}/{gallery}"] = _measure_pair(embedded[query], embedded[gallery], images, config, old, det)
    return Measurements({label: done[label] for label in (f"{query}/{gallery}" for query, gallery in pairs)}, images)


def _measure_pair(
    query: Embeddings, gallery: Embeddings, images: Images, config: EvaluationConfig, old: Measured | None, det: bool
) -> Measured:
    found: dict[str, Estimate] = {}
    outcomes = curve = None
    verified = figures.Verified({}, {}, {})
    vectors_ND, searched = comparable_query(query, gallery), comparable_gallery(query, gallery)
    if config.ranks or config.mean_average_precision or config.fpir:
        _require_roles(images.enrolled_N)
    if config.ranks or config.mean_average_precision:
        outcomes = figures.search_enrolled(vectors_ND, searched, images, None, config.mean_average_precision)
        found |= figures.closed_set(outcomes, images, config)
    if config.fpir:
        found |= figures.open_set(vectors_ND, searched, images, config.fpir)
    if config.far:
        scores = compared_scores(query, gallery, config.far, images.code_N)
        thresholds = old.thresholds if old is not None and query is not gallery else None
        verified = figures.verify(scores, images, config, thresholds)
        curve = figures.det(scores, images) if det else None
    in_order = {name: (found | verified.metrics)[name] for name in config.metric_names}
    names = query.generation, gallery.generation
    return Measured(*names, in_order, outcomes, verified.thresholds, verified.far_at_old, curve)


def _require_roles(enrolled_N: Bools) -> None:
    if enrolled_N.all() or not enrolled_N.any():
        raise DataError(
            f"the test set has {enrolled_N.sum()} enrolled images and {(~enrolled_N).sum()} queries; "
            "a search needs both: mark some of the images with the other role"
        )
