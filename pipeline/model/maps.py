"""Learned maps between the spaces of two generations, small and plain, as an artefact holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.schema import Config

Direction = Literal["query", "gallery"]


class MapConfig(Config):
    """What a map is, but for its weights."""

    parent: str = Field(description="the older generation")
    direction: Direction = Field(
        description="query: a new query's vector to the parent's space; gallery: the parent's gallery to the new space"
    )
    kind: Literal["linear", "mlp"]
    inputs: int = Field(gt=0, description="dimension of what is mapped")
    outputs: int = Field(gt=0, description="dimension of what comes out")
    bias: bool = Field(True, description="of a linear map")
    hidden: int | None = Field(None, gt=0, description="width of the two inner layers of an mlp")

    @property
    def prefix(self) -> str:
        """Of its weights' names among those of all maps of a generation."""
        return f"{self.direction}/{self.parent}/"


@dataclass(frozen=True)
class LearnedMap:
    """A map and the state dict of its `SpaceMap`."""

    config: MapConfig
    state: dict[str, Tensor]


class SpaceMap(nn.Module):
    """(N, inputs) embeddings to (N, outputs). Lengths tell nothing in a search by cosine, and are taken off first."""

    def __init__(self, config: MapConfig) -> None:
        super().__init__()
        self.layers: nn.Module = nn.Linear(config.inputs, config.outputs, config.bias)
        if config.kind == "mlp":
            assert config.hidden is not None, "an mlp has a width"
            self.layers = _mlp(config.inputs, config.hidden, config.outputs)

    def forward(self, vectors_ND: Tensor) -> Tensor:
        """Map vectors of any length."""
        mapped_NE: Tensor = self.layers(F.normalize(vectors_ND))
        return mapped_NE


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Layer norms, not batch norms: a vector is mapped alike whatever it is mapped beside."""
    inner = [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU()]
    inner += [nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()]
    return nn.Sequential(*inner, nn.Linear(hidden, outputs))
