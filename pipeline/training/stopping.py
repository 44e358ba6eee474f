"""Ending before the last step: any rank may be asked to, and all do so after the same step."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Wish(IntEnum):
    """What a rank has been asked; the strongest one of any rank is what all do."""

    GO_ON = 0
    AT_CHECKPOINT = 1  # after the next checkpoint that is due: there is no hurry
    NOW = 2  # after this step, with a checkpoint of it: the machine is about to go


Listen = Callable[[], Wish]  # what this rank has been asked so far; it must not block


def agree(wish: Wish, device: torch.device) -> Wish:
    """The strongest wish of any rank. Collective: one all-reduce of a number."""
    import torch  # here: the driver's board knows wishes, too, and has no use for it
    import torch.distributed as dist

    strongest = torch.tensor(int(wish), device=device)
    dist.all_reduce(strongest, dist.ReduceOp.MAX)
    return Wish(int(strongest))
