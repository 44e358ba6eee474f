"""Prototypes that are not learned but follow a parent's features: see `pipeline/compat/methods/live.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model import collectives
from pipeline.model.heads import NOT_HERE, Follow, Head
from pipeline.model.mesh import ClassMesh


class Followers:
    """The heads whose prototypes follow, and what an update has seen of the parents' features so far.

    After an update the prototype of each of its identities is the mean of the parent's unit features of the identity's
    samples in it. The mean, so that the order of samples, and with it the world size and accumulation, do not matter.
    """

    def __init__(self, heads: Sequence[Head], mesh: ClassMesh) -> None:
        self.heads = tuple(head for head in heads if isinstance(head.objective, Follow))
        self._mesh = mesh
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._longest = 0

    def see(self, labels_B: Tensor, guides_BE: Tensor, longest: int) -> None:
        """Take note of a micro-batch as its shard group has gathered it; no rank has more than `longest` samples."""
        if self.heads:
            self._seen.append((labels_B, guides_BE))
            self._longest += longest * self._mesh.shards

    def forget(self) -> None:
        """Begin anew, as after an update that was given up."""
        self._seen.clear()
        self._longest = 0

    def move(self) -> None:
        """Move the prototypes, in place. Collective where several ranks hold the same ones."""
        if not self._seen:
            return
        labels_B, guides_BE = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        guides_BE, labels_B = collectives.gather_batch(guides_BE, labels_B, self._longest, self._mesh.replica_group)
        self.forget()
        for head in self.heads:
            assert isinstance(head.objective, Follow)
            _follow(head, labels_B, guides_BE[:, head.objective.guide])


def _follow(head: Head, labels_B: Tensor, features_BD: Tensor) -> None:
    column_B = head.columns_of(labels_B)
    here_M = torch.nonzero(column_B != NOT_HERE).flatten()
    columns_K, place_M = torch.unique(column_B[here_M], return_inverse=True)
    sum_KD = features_BD.new_zeros(len(columns_K), features_BD.shape[1])
    sum_KD.index_add_(0, place_M, F.normalize(features_BD[here_M]))
    head.weight_CD.index_copy_(0, columns_K, F.normalize(sum_KD).to(head.weight_CD.dtype))
