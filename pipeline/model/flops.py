"""Arithmetic of a step on one rank, two operations a multiply-add."""

from __future__ import annotations

from collections.abc import Sequence

Rows = tuple[int, int]  # prototypes of a rank, and their dimension


def flops_of(
    forward_flops: int, samples: int, group_batch: int, new: Rows, parents: Sequence[Rows] = ()
) -> dict[str, int]:
    """What the losses ask for; what is computed again to save memory does not count.

    Args:
        forward_flops: of a sample through the backbone; training takes three times as many.
        samples: that go through this rank's backbone.
        group_batch: samples whose features its class group gathers.
        new: of the new classifier, those in a step's softmax: two products a pass, two passes.
        parents: logits and feature gradient alone, for they are frozen.
    """
    return {
        "backbone": 3 * forward_flops * samples,
        "classifier": 8 * group_batch * new[0] * new[1],
        "parents": 4 * group_batch * sum(rows * dim for rows, dim in parents),
    }
