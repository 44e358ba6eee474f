"""The verdict on a family's upgrades, as JSON: every figure with its interval, the criterion, the gain, the price.

Values are {"value", "low", "high"}, shares in [0, 1]; `low` and `high` are the ends of the 95 % interval over
identities, null where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.evaluation.backfill import backfill
from pipeline.evaluation.bootstrap import Estimate, difference, gain
from pipeline.evaluation.compatibility import Embeddings, average_compatibility
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import Measured, Measurements
from pipeline.evaluation.settings import EvaluationConfig, rate_name

SECTIONS = (
    "paragons",
    "matrix",
    "criterion",
    "update_gain",
    "average_compatibility",
    "negative_flips",
    "threshold",
    "backfill",
)


def build_report(
    measured: Measurements, lineage: Lineage, config: EvaluationConfig, embedded: Mapping[str, Embeddings] | None = None
) -> dict[str, Any]:
    """Judge all measured upgrades.

    Args:
        measured: all pairs of `lineage.pairs`.
        lineage: of the family.
        config: names the metrics, and those that the criterion is judged on.
        embedded: the test images by generation, for the backfill curves; None: no curves.

    Returns:
        `generations`, `paragons` (by the generation they stand beside), `criterion_on`, `matrix`, `criterion`,
        `update_gain`, `average_compatibility`, `negative_flips`, `threshold` and `backfill`; the last only for the
        lineage, the others for every cross-test, by "new/old".
    """
    cross = [one for one in measured.pairs.values() if one.query != one.gallery]
    return {
        "generations": list(lineage.order),
        "paragons": dict(lineage.paragons),
        "criterion_on": list(config.judged),
        "matrix": {
            name: {label: one.metrics[name].to_json() for label, one in measured.pairs.items()}
            for name in config.metric_names
        },
        "criterion": {label(one): _criterion(one, measured, lineage, config) for one in cross},
        "update_gain": {label(one): _gains(one, measured, lineage) for one in cross},
        "average_compatibility": {name: _average(name, measured, lineage) for name in config.metric_names},
        "negative_flips": {label(one): flips(one, measured) for one in cross if one.outcomes is not None},
        "threshold": {label(one): _thresholds(one, measured, config) for one in cross if one.thresholds},
        "backfill": {
            label(one): backfill(embedded[one.query], embedded[one.gallery], measured.images, config)
            for one in cross
            if embedded is not None and one.gallery in lineage.ancestors(one.query)
        },
    }


def label(one: Measured) -> str:
    """ "query/gallery"."""
    return f"{one.query}/{one.gallery}"


def _criterion(one: Measured, measured: Measurements, lineage: Lineage, config: EvaluationConfig) -> dict[str, Any]:
    """The empirical compatibility criterion, Shen et al. 2020, Eq. 3, strictly and on every metric judged.

    It is certain where the whole interval of every difference lies above nought.
    """
    old = measured[f"{one.gallery}/{one.gallery}"]
    differences = {name: difference(one.metrics[name], old.metrics[name]) for name in one.metrics}
    judged = [differences[name] for name in config.judged]
    return {
        "held": all(each.value > 0 for each in judged),
        "certain": all((each.interval() or (-np.inf,))[0] > 0 for each in judged),
        "ancestor": one.gallery in lineage.ancestors(one.query),
        "differences": {name: each.to_json() for name, each in differences.items()},
    }


def _gains(one: Measured, measured: Measurements, lineage: Lineage) -> dict[str, Any]:
    """Update gain by metric; None where the criterion fails on it, or there is no paragon to measure by."""
    paragon = lineage.paragons.get(one.query)
    if paragon is None or f"{paragon}/{paragon}" not in measured:
        return dict.fromkeys(one.metrics)
    gains = {
        name: gain(cross, *(measured.estimate(side, side, name) for side in (one.gallery, paragon)))
        for name, cross in one.metrics.items()
    }
    return {name: found.to_json() if found else None for name, found in gains.items()}


def _average(name: str, measured: Measurements, lineage: Lineage) -> dict[str, float | None]:
    """Average compatibility over the generations that are no paragons: those are yardsticks, and never serve."""
    served = lineage.served()
    estimates = {(one.query, one.gallery): one.metrics[name] for one in measured.pairs.values()}
    value = average_compatibility({pair: found.value for pair, found in estimates.items()}, served)
    if value is None:
        return {"value": None, "low": None, "high": None}
    replicates = [
        average_compatibility({pair: found.replicates_R[one] for pair, found in estimates.items()}, served)
        for one in range(measured.images.resampling.replicates)
    ]
    return Estimate(value, np.array(replicates, np.float64)).to_json()


def flips(one: Measured, measured: Measurements) -> dict[str, dict[str, float | None]]:
    """Share of mated queries that the old model got right at rank 1 and the new one gets wrong, and the reverse.

    Both search the old gallery. Source: Yan et al., "Positive-Congruent Training", CVPR 2021: negative flips.
    """
    old = measured[f"{one.gallery}/{one.gallery}"].outcomes
    assert old is not None
    assert one.outcomes is not None
    right_old_Q, right_new_Q = old.ahead_Q == 0, one.outcomes.ahead_Q == 0
    resampling, mated_Q = measured.images.resampling, old.mated_Q.astype(np.int64)
    flipped = {"negative": right_old_Q & ~right_new_Q, "positive": right_new_Q & ~right_old_Q}
    return {
        name: resampling.share_of_items(flip_Q, old.identity_Q, mated_Q).to_json() for name, flip_Q in flipped.items()
    }


def _thresholds(one: Measured, measured: Measurements, config: EvaluationConfig) -> dict[str, Any]:
    """What becomes of the old threshold when the new model's queries come, and the one that restores the FAR."""
    old, told = measured[f"{one.gallery}/{one.gallery}"], {}
    for name in (rate_name("far", far) for far in config.far):
        told[name] = {
            "old_threshold": _json(old.thresholds[name].value),
            "far_at_old_threshold": one.far_at_old[name].to_json(),
            "restoring_threshold": _json(one.thresholds[name].value),
        }
    return told


def _json(threshold: float) -> float | None:
    """A threshold; None where all pairs may pass."""
    return threshold if np.isfinite(threshold) else None
