"""Is a new generation compatible with an old one, and how much of the upgrade does it deliver?

M(query generation, gallery generation) is a figure where the queries are embedded by one model and the gallery
by another. Terms and definitions follow Shen et al., "Towards Backward-Compatible Representation Learning",
CVPR 2020: self-test M(g, g), cross-test M(new, old), the empirical compatibility criterion, the paragon (the
new model trained without regard to the old one) and the update gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from rich.table import Table

from pipeline.errors import ConfigError, DataError, GenerationError
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Float32, Int64
from pipeline.schema import Config

PARAGON = "paragon"


def tar_name(far: float) -> str:
    """Name of TAR at a FAR as reports write it: 0.001 -> "tar@1e-3", 0.00025 -> "tar@2.5e-4"."""
    return f"tar@{Decimal(repr(float(far))).normalize():e}"


class EvaluationConfig(Config):
    """What is measured for each pair of generations, and on which figures compatibility is judged."""

    far: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (1e-3,), description="False accept rates at which the true accept rate is reported, as 'tar@1e-3'."
    )
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), description="Ranks k at which closed-set identification is reported, as 'rank1'."
    )
    criterion_on: tuple[str, ...] = Field(
        (),
        description="Names of the metrics on which the compatibility criterion must hold; empty: every one reported.",
    )

    group: str = Field("group", description="The samples' attribute within whose equal values pairs are not compared.")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = self.metric_names
        if not names:
            raise ValueError("far and ranks are both empty: name at least one metric to evaluate")
        if len(set(names)) != len(names):
            raise ValueError(f"a metric is asked for twice in {', '.join(names)}: name each far and rank once")
        unknown = [name for name in self.criterion_on if name not in names]
        if unknown:
            raise ValueError(f"criterion_on names {unknown[0]!r}, which is not evaluated; choose of {', '.join(names)}")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the reported metrics, in the order of reports."""
        return (*(f"rank{k}" for k in self.ranks), *(tar_name(far) for far in self.far))


@dataclass(frozen=True)
class Embeddings:
    """The test images as one generation embeds them.

    Attributes:
        vectors_ND: (N, D) float32, any norm.
        identity_N: (N,) int64 rows of one identity table.
        group_N: (N,) int64 codes of the typeface (or camera): pairs within one are not compared.
        is_gallery_N: (N,) bool, true for the enrolled images, false for the queries.
        generation: name of the model.

    Raises:
        DataError: there is no image, or an embedding is not finite or all zeros; the message names the row.
    """

    vectors_ND: Float32
    identity_N: Int64
    group_N: Int64
    is_gallery_N: npt.NDArray[np.bool_]
    generation: str

    def __post_init__(self) -> None:
        count = len(self.vectors_ND)
        for name in ("identity_N", "group_N", "is_gallery_N"):
            assert getattr(self, name).shape == (count,), (
                f"{name} has shape {getattr(self, name).shape}, not ({count},)"
            )
        assert self.is_gallery_N.dtype == np.bool_
        metrics.unit_rows(self.vectors_ND, f"generation {self.generation}:")


def comparable_query(query: Embeddings, gallery: Embeddings) -> Float32:
    """Return the query vectors in the gallery's dimension, (N, D_gallery); cosines renormalise them.

    A new generation with more dimensions is compared by its leading D_old values, as in Shen et al. 2020 for
    an update that enlarges the embedding.

    Raises:
        GenerationError: the query has fewer dimensions than the gallery.
    """
    query_dim, gallery_dim = query.vectors_ND.shape[1], gallery.vectors_ND.shape[1]
    if query_dim < gallery_dim:
        raise GenerationError(
            f"queries of {query.generation} have {query_dim} dimensions, the gallery of {gallery.generation} has "
            f"{gallery_dim}: only a generation with at least as many dimensions can search it"
        )
    return query.vectors_ND[:, :gallery_dim]


def compared_scores(query: Embeddings, gallery: Embeddings, far: Sequence[float] = ()) -> metrics.VerificationScores:
    """Score all ordered pairs (i by query's model, j by gallery's), i != j, of different groups, both roles.

    The kept tail is long enough for every FAR in `far`.

    Raises:
        DataError: no genuine or no impostor pair is left.
        GenerationError: the query has fewer dimensions than the gallery.
    """
    _assert_same_images(query, gallery)
    pairs = len(query.identity_N) ** 2
    tail = max([metrics.TAIL, *(math.floor(rate * pairs) + 2 for rate in far)])
    return metrics.verification(
        comparable_query(query, gallery),
        query.identity_N,
        gallery.vectors_ND,
        gallery.identity_N,
        query_group_Q=query.group_N,
        gallery_group_G=gallery.group_N,
        same_images=True,
        tail=tail,
    )


def cross_test(query: Embeddings, gallery: Embeddings, config: EvaluationConfig) -> dict[str, float]:
    """Measure M(query generation, gallery generation); the self-test where both are one.

    rank-k searches the images enrolled in the gallery generation with the queries of the query generation.
    TAR@FAR is over all pairs of different images and different groups, in both roles (`compared_scores`).

    Args:
        query: all test images as the searching generation embeds them.
        gallery: the same images in the same order as the searched generation embeds them.
        config: which figures.

    Returns:
        metric name -> value in [0, 1], in the order of `config.metric_names`.

    Raises:
        DataError: no image in one of the roles, or too few pairs for a FAR.
        GenerationError: the query has fewer dimensions than the gallery.
    """
    _assert_same_images(query, gallery)
    measured: dict[str, float] = {}
    if config.ranks:
        enrolled_N = gallery.is_gallery_N
        if enrolled_N.all() or not enrolled_N.any():
            raise DataError(
                f"the test set has {np.count_nonzero(enrolled_N)} enrolled images and "
                f"{np.count_nonzero(~enrolled_N)} queries; rank-k needs both"
            )
        ranks = metrics.rank_k(
            comparable_query(query, gallery)[~enrolled_N],
            query.identity_N[~enrolled_N],
            gallery.vectors_ND[enrolled_N],
            gallery.identity_N[enrolled_N],
            config.ranks,
        )
        measured.update({f"rank{k}": value for k, value in ranks.items()})
    if config.far:
        scores = compared_scores(query, gallery, config.far)
        measured.update({tar_name(far): metrics.tar_at_far(scores, far) for far in config.far})
    return measured


def _assert_same_images(query: Embeddings, gallery: Embeddings) -> None:
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
    Source: Shen et al. 2020, the update gain.
    """
    if not cross > old or not paragon > old:
        return None
    return (cross - old) / (paragon - old)


@dataclass(frozen=True)
class Report:
    """The verdict on one upgrade.

    Attributes:
        old: name of the generation whose gallery is searched.
        new: name of the generation that searches it.
        generations: labels in use, oldest first; the paragon's is "paragon".
        metrics: metric -> "query/gallery" -> value.
        criterion: "new/old" -> does the criterion hold on all of `criterion_on`.
        criterion_on: the metrics the criterion is judged on.
        update_gain: metric -> gain or None; empty without a paragon.
    """

    old: str
    new: str
    generations: tuple[str, ...]
    metrics: dict[str, dict[str, float]]
    criterion: dict[str, bool]
    criterion_on: tuple[str, ...]
    update_gain: dict[str, float | None]

    @property
    def compatible(self) -> bool:
        """Does the criterion hold for the new generation on the old gallery?"""
        return self.criterion[f"{self.new}/{self.old}"]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "generations": list(self.generations),
            "metrics": {name: dict(row) for name, row in self.metrics.items()},
            "criterion": dict(self.criterion),
            "criterion_on": list(self.criterion_on),
            "update_gain": dict(self.update_gain),
        }


def build_report(
    pairs: Mapping[str, Mapping[str, float]],
    old: str,
    new: str,
    paragon: str | None = None,
    criterion_on: Sequence[str] = (),
) -> Report:
    """Judge the upgrade from `old` to `new` by its measured pairs.

    Args:
        pairs: "query/gallery" -> metric -> value, as `cross_test` returns it; needs old/old and new/old, and
            paragon/paragon where a paragon is named. All pairs hold the same metrics.
        old: name of the old generation.
        new: name of the new generation.
        paragon: name of the new model trained without a parent; labels write it "paragon".
        criterion_on: metrics the criterion is judged on; empty: all.

    Raises:
        DataError: a pair that is needed was not measured.
        ConfigError: criterion_on names a metric that was not measured.
    """
    named = {_with_paragon(label, paragon): dict(values) for label, values in pairs.items()}
    self_old, cross = f"{old}/{old}", f"{new}/{old}"
    needed = [self_old, cross] + ([f"{PARAGON}/{PARAGON}"] if paragon is not None else [])
    missing = [label for label in needed if label not in named]
    if missing:
        raise DataError(f"pair {missing[0]} was not measured; the report on {new} over {old} needs {', '.join(needed)}")
    names = tuple(named[self_old])
    assert all(set(values) == set(names) for values in named.values()), "pairs hold different metrics"
    unknown = [name for name in criterion_on if name not in names]
    if unknown:
        raise ConfigError(f"criterion_on names {unknown[0]!r}, which was not measured; choose of {', '.join(names)}")
    judged = tuple(criterion_on) or names
    generations = [old, new] + ([PARAGON] if paragon is not None else [])
    generations += sorted({side for label in named for side in label.split("/")} - set(generations))
    gain: dict[str, float | None] = {}
    if paragon is not None:
        reached = named[f"{PARAGON}/{PARAGON}"]
        gain = {name: update_gain(named[cross][name], named[self_old][name], reached[name]) for name in names}
    order = sorted(named, key=lambda label: [generations.index(side) for side in label.split("/")])
    return Report(
        old=old,
        new=new,
        generations=tuple(generations),
        metrics={name: {label: float(named[label][name]) for label in order} for name in names},
        criterion={
            cross: criterion({m: named[cross][m] for m in judged}, {m: named[self_old][m] for m in judged}),
        },
        criterion_on=judged,
        update_gain=gain,
    )


def _with_paragon(label: str, paragon: str | None) -> str:
    sides = label.split("/")
    assert len(sides) == 2, f"pair {label!r} is not 'query/gallery'"
    return "/".join(PARAGON if side == paragon else side for side in sides)


def render_table(report: Report) -> Table:
    """Lay a report out for the terminal: a row a pair, a column a metric, then the verdict and the gain."""
    self_old, cross = f"{report.old}/{report.old}", f"{report.new}/{report.old}"
    names = tuple(report.metrics)
    verdict = "compatible" if report.compatible else "NOT compatible"
    table = Table(
        title=f"{report.new} is {verdict} with {report.old}",
        caption=f"compatible: {cross} above {self_old} on {', '.join(report.criterion_on)}",
    )
    table.add_column("query/gallery", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    labels = tuple(report.metrics[names[0]])
    for label in labels:
        table.add_row(label, *(f"{report.metrics[name][label]:.4f}" for name in names), end_section=label == labels[-1])
    margins = [report.metrics[name][cross] - report.metrics[name][self_old] for name in names]
    table.add_row("criterion", *(f"{'met' if margin > 0 else 'no'} {margin:+.4f}" for margin in margins))
    if report.update_gain:
        gains = [report.update_gain[name] for name in names]
        table.add_row("update gain", *("none" if gain is None else f"{gain:.1%}" for gain in gains))
    return table
