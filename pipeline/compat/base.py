"""What a method of compatibility is: a small class that says which losses hold a new model to its parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.compat.means import ImagesOf, class_means
from pipeline.errors import GenerationError
from pipeline.generation import Generation
from pipeline.model.heads import Head
from pipeline.model.maps import LearnedMap
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.terms import BatchLoss
from pipeline.schema import Config


@dataclass(frozen=True)
class Parent:
    """A parent as one rank of a training sees it.

    Attributes:
        generation: its verified artefact.
        head: this rank's part of its classifier, aligned to the new identity table.
        guide: columns of its features among the guides, where the method asks for features.
        means_CD: (C, D_old) mean of the parent's unit features over all images of each of this rank's identities of the
            new table, first row first; its length, at most 1, says how close together they lie. None unless the
            method asks for it.
        first_row: the table's row of `means_CD[0]`.
        length: of the parent's prototypes, on average.
        margin: of the new generation.
        spread_C: (C,) cosine to its mean that the share `asks_spread` of each identity's images reach. None unless
            the method asks for it.
        mesh: the ranks that hold all the means together.
    """

    generation: Generation
    head: Head
    guide: slice
    means_CD: Tensor | None
    first_row: int
    length: float
    margin: MarginConfig
    spread_C: Tensor | None = None
    mesh: ClassMesh = field(default_factory=ClassMesh)

    @property
    def name(self) -> str:
        """Of the generation."""
        return self.generation.record.name


class Companion(nn.Module):
    """Learned parts that a method sets beside the backbone; DeepSpeed trains both as one.

    Attributes:
        losses: names of the losses that `forward` gives.
    """

    losses: tuple[str, ...] = ()

    def forward(self, features_bD: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier is to see of this rank's samples, (b, D), and (b, losses) for each of them.

        Args:
            features_bD: of the backbone.
            guides_bE: the parents' features of the same images, side by side.
            labels_b: rows of the identity table.
        """
        raise NotImplementedError

    def exported_maps(self, state: Mapping[str, Tensor]) -> list[LearnedMap]:
        """The maps between the new space and the parents' that the artefact is to hold and the evaluation to use.

        Args:
            state: the companion's own state dict, whole: under ZeRO its parameters may be in pieces.
        """
        del state
        return []


class Method(Config):
    """How a generation is held to its parents: L = L_new + lambda * sum of what the hooks give, for each parent.

    A method overrides the hooks that it needs. All heads and losses travel in the classifier's three collectives.
    """

    method: str
    weight: float = Field(1.0, ge=0, description="lambda, the factor on each loss towards a parent")
    weight_end: float | None = Field(None, ge=0, description="lambda moves to this value, linearly; none: it stays")
    warmup: float = Field(0.0, ge=0, le=1, description="share of the steps over which lambda rises from 0")

    takes_parents: ClassVar[bool] = True
    asks_features: ClassVar[bool] = False  # of the parents, for each batch
    starts_from_parent: ClassVar[bool] = False  # the backbone's first weights are the (only) parent's
    compares_samples: ClassVar[bool] = False  # of a micro-batch with each other: its size shapes the loss

    @property
    def asks_means(self) -> bool:
        """Whether it needs the class means of the parents' features before the first step."""
        return False

    @property
    def asks_spread(self) -> float | None:
        """Share of an identity's images of which it needs to know how far from their mean they lie; None: not."""
        return None

    @property
    def asks_backbone(self) -> bool:
        """Whether it needs more of a parent than its classifier."""
        return self.asks_features or self.asks_means or self.starts_from_parent

    def check_parent(self, parent: Generation) -> None:
        """Refuse a parent that the method cannot be held to.

        Raises:
            GenerationError: only embeddings are left of it, and the method needs its backbone.
        """
        if parent.record.backbone is None and self.asks_backbone:
            raise GenerationError(
                f"compat.method {self.method!r} needs the backbone of parent {parent.record.name!r}, of which only "
                f"embeddings are left ({parent.path}): take 'bct', which needs its classifier alone"
            )

    def means(
        self, backbone: nn.Module, images_of: ImagesOf, first_row: int, end_row: int, dim: int, device: torch.device
    ) -> Tensor:
        """(C, D_old) means of a parent's unit features of identities, for a method that asks for them."""
        return class_means(backbone, images_of(first_row, end_row), first_row, end_row, dim, device)

    def weight_at(self, step: int, steps: int) -> float:
        """Lambda at a step: a pure function, so that a resumed run needs no state."""
        end = self.weight if self.weight_end is None else self.weight_end
        weight = self.weight + (end - self.weight) * step / max(1, steps - 1)
        return weight * min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else weight

    def heads(self, parent: Parent) -> list[Head]:
        """Frozen heads beside the new classifier."""
        del parent
        return []

    def batch_losses(self, parent: Parent) -> list[BatchLoss]:
        """Losses over the gathered batch."""
        del parent
        return []

    def companion(self, dim: int, parents: Sequence[Parent]) -> Companion | None:
        """Learned parts beside a backbone of `dim` feature values."""
        del dim, parents
        return None
