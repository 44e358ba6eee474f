"""Intervals by resampling identities.

A replicate draws as many identities as there are, with replacement: identity i comes w_i times. A genuine pair of i
then counts w_i times, an impostor pair of i and j w_i w_j times, a query of i w_i times. The same draws serve all
pairs of generations, so that differences are paired. Intervals are the percentiles of the replicates: Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Images are not resampled: those of one identity
are no independent draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.metrics import Float32, Float64, Int64, VerificationScores, allowed

LEVEL = 0.95
SPAN = 128  # pairs of the tail summed at once
LIMIT = 1 << 19  # pairs of the tail that are weighted; of a longer one every so many-th, in order
COLUMNS = 128  # replicates at a time where whole images are weighted

UInt16 = npt.NDArray[np.uint16]
Numbers = npt.NDArray[np.number] | npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure and its replicates.

    Attributes:
        value: from all identities, each once.
        replicates_R: (R,) float64, the same figure from each draw; NaN where a draw does not define it; empty: none
            were asked for.
    """

    value: float
    replicates_R: Float64

    def interval(self) -> tuple[float, float] | None:
        """The percentile interval at LEVEL, its ends among the replicates; None: no replicate defines the figure."""
        sorted_R = np.sort(self.replicates_R[~np.isnan(self.replicates_R)])
        if not sorted_R.size:
            return None
        cut = (1 - LEVEL) / 2 * (sorted_R.size - 1)
        return float(sorted_R[math.floor(cut)]), float(sorted_R[math.ceil(sorted_R.size - 1 - cut)])

    def to_json(self) -> dict[str, float | None]:
        """`value`, `low` and `high`; an end that does not exist or is not finite is None."""
        low, high = self.interval() or (math.nan, math.nan)
        return {key: _finite(one) for key, one in (("value", self.value), ("low", low), ("high", high))}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first` less `second`, replicate by replicate."""
    return Estimate(first.value - second.value, first.replicates_R - second.replicates_R)


def gain(cross: Estimate, old: Estimate, paragon: Estimate) -> Estimate | None:
    """Update gain with its replicates; None where `compatibility.update_gain` is.

    (M(new, old) - M(old, old)) / (M(paragon, paragon) - M(old, old)), Shen et al. 2020, Eq. 9. A replicate in which the
    paragon is no better than the old model has no finite gain: it stands at the end of its numerator's sign.
    """
    if not cross.value > old.value or not paragon.value > old.value:
        return None
    above_R, room_R = cross.replicates_R - old.replicates_R, paragon.replicates_R - old.replicates_R
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_R = np.where(room_R > 0, above_R / room_R, np.copysign(np.inf, above_R))
    gain_R[np.isnan(above_R) | np.isnan(room_R)] = np.nan
    return Estimate((cross.value - old.value) / (paragon.value - old.value), gain_R)


@dataclass(frozen=True)
class Resampling:
    """The draws.

    Attributes:
        weight_IR: (I, R) uint16, how often replicate r draws identity i.
    """

    weight_IR: UInt16

    @classmethod
    def draw(cls, identities: int, replicates: int, seed: int) -> Resampling:
        """Draw `replicates` times `identities` of them with replacement."""
        random = np.random.default_rng([seed, identities])
        drawn_RI = random.multinomial(identities, np.full(identities, 1 / identities), size=replicates)
        return cls(np.ascontiguousarray(drawn_RI.T.astype(np.uint16)))

    @cached_property
    def _float_ir(self) -> Float64:
        return self.weight_IR.astype(np.float64)

    @property
    def replicates(self) -> int:
        """R."""
        return int(self.weight_IR.shape[1])

    def first(self, replicates: int) -> Resampling:
        """The first so many draws."""
        return Resampling(self.weight_IR[:, :replicates])

    def totals(self, count_I: Numbers) -> Float64:
        """(R,) sums of what each identity contributes, weighted."""
        return count_I.astype(np.float64) @ self._float_ir

    def share(self, part_I: Numbers, whole_I: Numbers) -> Estimate:
        """The ratio of two sums over identities; NaN where a draw makes the whole nought."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(part_I.sum() / whole_I.sum()), self.totals(part_I) / self.totals(whole_I))

    def share_of_items(self, value_Q: Numbers, identity_Q: Int64, counted_Q: Int64) -> Estimate:
        """The mean of `value_Q` over the items where `counted_Q`, each weighted as its identity."""
        size = len(self.weight_IR)
        whole_I = np.bincount(identity_Q, counted_Q, size)
        return self.share(np.bincount(identity_Q, value_Q * counted_Q, size), whole_I)

    def share_reaching(self, score_P: Float32, identity_P: Int64, whole_I: Int64, threshold_R: Float32) -> Float64:
        """(R,) weighted number of items with score >= the replicate's threshold, by the weighted `whole_I`."""
        order_R = np.argsort(threshold_R, kind="stable")
        reached_P = np.searchsorted(threshold_R[order_R], score_P, side="right")  # thresholds, from the lowest
        size, columns = len(self.weight_IR), self.replicates + 1
        counts_IR = np.bincount(identity_P * columns + reached_P, minlength=size * columns).reshape(size, columns)
        reaching_IR = counts_IR[:, :0:-1].cumsum(axis=1)[:, ::-1]  # of how many items each threshold is reached
        part_R = np.empty(self.replicates)
        part_R[order_R] = np.einsum("ir,ir->r", self._float_ir[:, order_R], reaching_IR)
        with np.errstate(divide="ignore", invalid="ignore"):
            return part_R / self.totals(whole_I)

    def query_threshold(self, score_U: Float32, identity_U: Int64, fpir: float) -> Float32:
        """(R,) float32 thresholds by the rule of `identification.threshold_at_fpir`, a query counting as its identity.

        Where a draw leaves so few queries that none may pass, the threshold is above the highest score drawn.

        Args:
            score_U: (U,) best scores of the non-mated queries.
            identity_U: (U,) their identities.
            fpir: share of them that may reach the threshold.
        """
        order_U = np.argsort(-score_U, kind="stable")
        next_up_U = np.append(np.nextafter(score_U[order_U], np.float32(np.inf)), np.float32(-np.inf))
        threshold_R = np.empty(self.replicates, np.float32)
        for first in range(0, self.replicates, COLUMNS):
            part = slice(first, first + COLUMNS)
            before_Ur = np.cumsum(self.weight_IR[identity_U[order_U], part], axis=0, dtype=np.int64)
            allowed_r = [allowed(fpir, int(total)) for total in before_Ur[-1]]
            threshold_R[part] = next_up_U[np.count_nonzero(before_Ur <= allowed_r, axis=0)]
        return threshold_R

    def impostor_weight(self, identity_N: Int64, group_N: Int64) -> Int64:
        """(R,) weighted number of ordered pairs of two identities and two groups, both sides the same images.

        In closed form: all pairs of images, less those of one group, less those of one identity that are of two groups.
        """
        total_R = self.totals(np.bincount(identity_N, minlength=len(self.weight_IR)))
        order_N = np.argsort(group_N, kind="stable")
        start_G = np.flatnonzero(np.diff(group_N[order_N], prepend=group_N.min() - 1))
        same_group_R = np.empty(self.replicates)
        for first in range(0, self.replicates, COLUMNS):
            part = slice(first, first + COLUMNS)
            weight_Nr = self._float_ir[identity_N[order_N], part]
            same_group_R[part] = (np.add.reduceat(weight_Nr, start_G, axis=0) ** 2).sum(axis=0)
        return np.rint(total_R**2 - same_group_R - self._mates_weight(identity_N, group_N)).astype(np.int64)

    def _mates_weight(self, identity_N: Int64, group_N: Int64) -> Float64:
        """(R,) weighted number of ordered pairs of one identity and two groups, as if both ends were drawn."""
        size = len(self.weight_IR)
        images_I = np.bincount(identity_N, minlength=size)
        (identity_U, _), images_U = np.unique(np.stack([identity_N, group_N]), axis=1, return_counts=True)
        pairs_I = images_I**2 - np.bincount(identity_U, images_U**2, size)
        return pairs_I @ self._float_ir**2


class WeightedTail:
    """The highest impostor scores, counted as each replicate counts them.

    Args:
        scores: with the identities of the tail's pairs, as rows of the draws.
        resampling: the draws.
        total_R: (R,) weighted number of all impostor pairs.
    """

    def __init__(self, scores: VerificationScores, resampling: Resampling, total_R: Int64) -> None:
        assert scores.tail_query_T is not None
        assert scores.tail_gallery_T is not None
        self._weight_IR, self._total_R = resampling.weight_IR, total_R
        length, copies = len(scores.impostor_tail_T), 2 if scores.doubled else 1
        self._stride = copies * max(1, -(-length // (copies * LIMIT)))
        self._score_T = scores.impostor_tail_T[:: self._stride]
        self._query_T, self._gallery_T = scores.tail_query_T[:: self._stride], scores.tail_gallery_T[:: self._stride]
        self._whole = length == scores.impostors
        self._before_BR = self._sum_spans()

    def _sum_spans(self) -> Int64:
        """(B + 1, R) weight of all pairs before each span."""
        size = len(self._score_T)
        starts = range(0, size, SPAN)
        spans_BR = np.zeros((len(starts) + 1, self._weight_IR.shape[1]), np.int64)
        largest = int(self._weight_IR.max(initial=0))
        # In 16 bits, as long as a span's sum fits: the sums are bound by memory.
        weight_IR = self._weight_IR if largest**2 * SPAN < 1 << 16 else self._weight_IR.astype(np.uint64)
        for number, first in enumerate(starts, start=1):
            span = slice(first, first + SPAN)
            product_tR = weight_IR[self._query_T[span]]
            product_tR *= weight_IR[self._gallery_T[span]]
            spans_BR[number] = np.add.reduce(product_tR, axis=0, dtype=product_tR.dtype)
        spans_BR *= self._stride
        return np.cumsum(spans_BR, axis=0, out=spans_BR)

    def _within(self, span_R: Int64) -> Int64:
        """(R, SPAN) weight of a span of pairs, up to and with each, a span for each replicate."""
        place_Rt = span_R[:, None] * SPAN + np.arange(SPAN)
        there_Rt = place_Rt < len(self._score_T)
        place_Rt[~there_Rt] = 0
        column_R1 = np.arange(len(span_R))[:, None]
        product_Rt = self._weight_IR[self._query_T[place_Rt], column_R1].astype(np.int64)
        product_Rt *= self._weight_IR[self._gallery_T[place_Rt], column_R1] * there_Rt
        return np.cumsum(product_Rt, axis=1) * self._stride

    def threshold(self, far: float) -> Float32:
        """(R,) float32 thresholds by the rule of `metrics.threshold_at_far`, a pair counting as often as it is drawn.

        Where the tail ends before a replicate's threshold, its last score stands for it.
        """
        allowed_R = np.array([allowed(far, int(total)) for total in self._total_R], np.int64)
        span_R = np.count_nonzero(self._before_BR[1:] <= allowed_R, axis=0)
        inside_R = span_R < len(self._before_BR) - 1
        span_R = np.minimum(span_R, len(self._before_BR) - 2)
        start_R = self._before_BR[span_R, np.arange(len(span_R))]
        place_R = span_R * SPAN + np.count_nonzero(
            self._within(span_R) + start_R[:, None] <= allowed_R[:, None], axis=1
        )
        rejected_R = self._score_T[np.minimum(place_R, len(self._score_T) - 1)]
        threshold_R: Float32 = np.nextafter(rejected_R, np.float32(np.inf))
        if self._whole:
            threshold_R[~inside_R] = -np.inf
        return threshold_R

    def far(self, threshold_R: Float32) -> Float64:
        """(R,) weighted share of the impostors that reach each replicate's threshold; NaN below the tail's end."""
        place_R = np.searchsorted(-self._score_T, -threshold_R, side="right")
        beyond_R = (place_R == len(self._score_T)) & (not self._whole)
        span_R = np.minimum(place_R // SPAN, len(self._before_BR) - 2)
        into_R = place_R - span_R * SPAN
        inside_R = self._within(span_R)[np.arange(len(span_R)), np.maximum(into_R - 1, 0)] * (into_R > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share_R: Float64 = (self._before_BR[span_R, np.arange(len(span_R))] + inside_R) / self._total_R
        share_R[beyond_R] = np.nan
        return share_R
