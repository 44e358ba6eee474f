"""The impostors' scores of a verification, in bounded memory: the highest with their pairs, and a histogram of all."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.metrics import BINS, Float32, Int64

__all__ = ["BINS", "EXCLUDED", "Impostors"]

WIDTH = 2 / BINS
EXCLUDED = -2.0  # stands for a pair that is not compared; below every cosine


class Impostors:
    """Keeps the `tail` highest of a stream of scores with their pairs, a histogram of all, and their number.

    Args:
        tail: scores to keep.
        error: how far the scores of `candidates` may be off.
    """

    def __init__(self, tail: int, error: float) -> None:
        assert tail >= 1
        self.tail, self._error = tail, error
        self.histogram_B = np.zeros(BINS, np.int64)
        self._kept: list[tuple[Float32, Int64, Int64]] = []
        self._size = 0
        self._floor = EXCLUDED  # `tail` scores are known to be at least this high

    @property
    def count(self) -> int:
        """Scores so far."""
        return int(self.histogram_B.sum())

    def candidates(self, scores_P: Float32) -> Int64:
        """Count scores that may be off by `error`, and say which of them may belong to the tail.

        EXCLUDED ones do not count. A score is counted up to `error` higher than it is, so that what lies on an edge,
        like the 0 of embeddings that cancel, is never counted below it.
        """
        place_P = scores_P - np.float32(EXCLUDED - self._error)
        place_P *= np.float32(1 / WIDTH)
        count_B = np.bincount(place_P.astype(np.intp), minlength=2 * BINS)
        first = round((-1 - EXCLUDED) / WIDTH)
        count_B[first] += count_B[1:first].sum()  # rounded below -1
        count_B[first + BINS - 1] += count_B[first + BINS :].sum()  # 1 itself
        self.histogram_B += count_B[first : first + BINS]
        above_B = np.cumsum(self.histogram_B[::-1])[::-1]
        if full := np.count_nonzero(above_B >= self.tail):
            self._floor = max(self._floor, -1 + (full - 1) * WIDTH - 2 * self._error)
        return np.flatnonzero(scores_P > max(self._floor - self._error, -1.5))

    def keep(self, scores_P: Float32, row_P: Int64, column_P: Int64) -> None:
        """Take exact scores, and the pairs that they are of."""
        high_P = np.flatnonzero(scores_P >= self._floor)
        self._kept.append((scores_P[high_P], row_P[high_P], column_P[high_P]))
        self._size += high_P.size
        if self._size > 2 * self.tail:
            self._shrink()

    def _shrink(self) -> None:
        score_P = np.concatenate([scores for scores, _, _ in self._kept])
        row_P = np.concatenate([rows for _, rows, _ in self._kept])
        column_P = np.concatenate([columns for _, _, columns in self._kept])
        if score_P.size > self.tail:
            highest_T = np.argpartition(score_P, score_P.size - self.tail)[-self.tail :]
            score_P, row_P, column_P = score_P[highest_T], row_P[highest_T], column_P[highest_T]
            self._floor = max(self._floor, float(score_P.min()))
        self._kept = [(score_P, row_P, column_P)]
        self._size = score_P.size

    def highest(self) -> tuple[Float32, Int64, Int64]:
        """The tail in descending order: scores, and the rows and columns of their pairs, each (T,)."""
        self._shrink()
        ((score_T, row_T, column_T),) = self._kept
        order_T = np.argsort(-score_T, kind="stable")
        return score_T[order_T], row_T[order_T], column_T[order_T]
