"""The paper's own: the influence loss on the parent's classifier, in its three forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.model.heads import Distil, Head
from pipeline.model.margins import MarginConfig


class _Influence(Method):
    prototypes: Literal["classifier", "means"] = Field(
        "classifier", description="of the influence loss: the parent's own, or the class means of its features"
    )
    margin: float | None = Field(
        None, ge=0, lt=1, description="cosine margin of the influence loss; none: the parent's own margin"
    )

    @property
    def asks_means(self) -> bool:
        """Where they take the place of the classifier."""
        return self.prototypes == "means"

    def _head(self, parent: Parent, confidence: float | None = None) -> Head:
        """The parent's classifier, or what takes its place; `confidence`: joined by new identities' class means."""
        if self.prototypes == "means" and parent.generation.record.backbone is not None:
            head = means_head(parent)
        else:
            head = parent.head if confidence is None else joined_head(parent, confidence)
        return replace(head, margin=influence_margin(head.margin, self.margin))


class Bct(_Influence):
    """The influence loss on the identities that the parent knows.

    Source: Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, Eq. 5 and 8, beta on T_old:
    the loss of the new model's features through the parent's frozen classifier, under the parent's own normalisation,
    scale and margin. `prototypes: means` replaces that classifier by the class means of the parent's features, for
    parents whose prototypes are not where their features are (plain softmax), or are lost. A parent of which only
    embeddings are left has class means for a classifier already: both settings take it.
    """

    method: Literal["bct"] = "bct"

    @property
    def asks_backbone(self) -> bool:
        """Not even for class means: those of lost backbones are the classifier."""
        return False

    def heads(self, parent: Parent) -> list[Head]:
        """One: the parent's classifier."""
        return [self._head(parent)]


class BctKd(_Influence):
    """The influence loss, and distillation on the images of identities that the parent does not know.

    Source: Shen et al. 2020, section 3.3, "knowledge distillation": on T_new the parent's own probabilities over its
    classifier are the target, at the temperature of its scale.
    """

    method: Literal["bct-kd"] = "bct-kd"
    asks_features = True

    def heads(self, parent: Parent) -> list[Head]:
        """The parent's classifier twice: towards the own identity, and towards what the parent says."""
        return [self._head(parent), distilled(parent, f"{parent.name}/kd", 1.0, unknown_only=True)]


class BctSys(_Influence):
    """The influence loss over the parent's classifier and synthesised prototypes of the new identities.

    Source: Shen et al. 2020, section 3.3, "synthesized classifier weights": the prototype of an identity that the
    parent does not know is the mean of the parent's features of its images, brought to the length of the others.
    """

    method: Literal["bct-sys"] = "bct-sys"
    confidence: float = Field(
        0.0, ge=0, lt=1, description="least length of the mean of an identity's unit features for it to be synthesised"
    )

    @property
    def asks_means(self) -> bool:
        """Of the new identities."""
        return True

    def heads(self, parent: Parent) -> list[Head]:
        """One: the parent's prototypes, joined by those of the identities that it does not know."""
        return [self._head(parent, self.confidence)]


def influence_margin(margin: MarginConfig, cosine: float | None) -> MarginConfig:
    """The parent's convention, with another cosine margin in place of its own if one is given."""
    if cosine is None or not margin.normalised:
        return margin
    if cosine == 0:
        return MarginConfig(name="norm_softmax", scale=margin.scale)
    return MarginConfig(name="cosface", scale=margin.scale, m3=cosine)


def distilled(parent: Parent, name: str, temperature: float, unknown_only: bool) -> Head:
    """The parent's classifier with the parent's probabilities as the target; `temperature` divides its logits."""
    scale = parent.head.margin.scale / temperature
    margin = parent.head.margin.model_copy(update={"scale": scale})  # unnormalised logits are divided too
    return replace(parent.head, name=name, margin=margin, objective=Distil(parent.guide, unknown_only))


def means_head(parent: Parent) -> Head:
    """A cosine head whose prototypes are the class means of the parent's features.

    A parent without normalisation gives no scale for cosines: then it is the new generation's.
    """
    assert parent.means_CD is not None, "the method asks for class means"
    rows_C = torch.arange(len(parent.means_CD), device=parent.means_CD.device) + parent.first_row
    there_C = parent.means_CD.norm(dim=1) > 0
    return Head(parent.name, F.normalize(parent.means_CD[there_C]), rows_C[there_C], cosine_margin(parent))


def cosine_margin(parent: Parent) -> MarginConfig:
    """Of a head on the parent's features: the parent's own, or norm-softmax at the new scale if it has no cosines."""
    own = parent.head.margin
    return own if own.normalised else MarginConfig(name="norm_softmax", scale=parent.margin.scale)


def joined_head(parent: Parent, confidence: float) -> Head:
    """The parent's prototypes and, for identities without one, class means of the same length."""
    assert parent.means_CD is not None, "the method asks for class means"
    head = parent.head
    assert not isinstance(head.rows_C, range)
    rows_C = torch.arange(len(parent.means_CD), device=head.weight_CD.device) + parent.first_row
    new_C = ~torch.isin(rows_C, head.rows_C) & (parent.means_CD.norm(dim=1) > confidence)
    rows_C, order_C = torch.sort(torch.cat([head.rows_C, rows_C[new_C]]))
    fresh_KD = F.normalize(parent.means_CD[new_C]) * parent.length
    return replace(head, weight_CD=torch.cat([head.weight_CD, fresh_KD])[order_C], rows_C=rows_C)
