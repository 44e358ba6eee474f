"""Ending before the last step: any rank may be asked to, and all do so after the same step.

What a rank was asked travels with what the ranks agree on in each step anyway (`guards.all_finite`).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum


class Wish(IntEnum):
    """What a rank has been asked; the strongest one of any rank is what all do."""

    GO_ON = 0
    AT_CHECKPOINT = 1  # after the next checkpoint that is due: there is no hurry
    NOW = 2  # after this step, with a checkpoint of it: the machine is about to go


Listen = Callable[[], Wish]  # what this rank has been asked so far; it must not block
