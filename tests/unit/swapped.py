"""Ten items of which an old model shows half as their neighbours, and what a search of them finds during a backfill."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]


def right_and_wrong() -> tuple[Float, Float]:
    """(10, 10) the new model's vectors, and the old one's: it shows items 5 to 9 as the next one's."""
    right = np.eye(10, dtype=np.float32)
    wrong = right.copy()
    wrong[5:] = np.roll(right[5:], 1, axis=0)
    return right, wrong


def rank1_by_hand(order: Sequence[int]) -> list[float]:
    """Rank-1 of the new model's ten queries after each step of a backfill in that order."""
    expected = []
    for step in range(11):
        renewed = set(order[:step])
        shown = {item: item if item < 5 or item in renewed else 5 + (item - 6) % 5 for item in range(10)}
        # A query finds its mate if that shows it, and no other item shows the same: ties go against the query.
        expected.append(float(np.mean([shown[q] == q and list(shown.values()).count(q) == 1 for q in range(10)])))
    return expected
