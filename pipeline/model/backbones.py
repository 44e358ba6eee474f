"""Backbones by name: images in, features out.

A backbone is a trunk (images to maps) and a head (maps to features). The features are not normalised: that is the
margin's business; and no ReLU ends them unless asked for: one generation's ReLU leaves the next no compatible space.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model import iresnet, resnet
from pipeline.model.iresnet import IResNetTrunk
from pipeline.model.resnet import ResNetTrunk
from pipeline.model.small import SmallTrunk
from pipeline.schema import Config

TIMM_PREFIX = "timm:"
_TIMM_HINT = "pip install bct-pipeline[timm] (it needs a torchvision that matches torch), or choose another backbone"

Trunk = SmallTrunk | IResNetTrunk | ResNetTrunk


class BackboneConfig(Config):
    """Which network turns images into features, and how large.

    Raises:
        ConfigError: the name is not known, or a field is set that the named backbone does not have.
    """

    name: str = Field(
        default="small",
        description="small, iresnet18, iresnet34, iresnet50, iresnet100, resnet50, resnet101, or timm:NAME for a "
        "network of the timm package (an optional extra).",
    )
    embedding_dim: int = Field(default=128, ge=2, description="Dimension D of the features.")
    image_size: int = Field(default=32, ge=8, le=4096, description="Side of the square input images, in pixels.")
    channels: Literal[1, 3] = Field(default=1, description="Channels of the input images: 1 (grey) or 3 (RGB).")
    width: int = Field(default=32, ge=1, description="Only for small: channels of the stem; the stages have 2x, 4x.")
    depth: int = Field(default=1, ge=0, description="Only for small: stride-1 convolutions of a stage.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Share of the head's inputs dropped in training.")
    relu: bool = Field(
        default=False, description="End the features in a ReLU: for showing that it leaves no compatible space."
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TRUNKS and not (name.startswith(TIMM_PREFIX) and name != TIMM_PREFIX):
            raise ConfigError(_unknown(name, [*TRUNKS, TIMM_PREFIX + "NAME"]))
        return name

    @model_validator(mode="after")
    def _only_small_has_width_and_depth(self) -> Self:
        for field in ("width", "depth"):
            value = getattr(self, field)
            if self.name != "small" and value != type(self).model_fields[field].default:
                raise ConfigError(
                    f"backbone.{field} is {value}, but backbone {self.name!r} has a fixed {field}: "
                    f"leave {field} out, or set backbone.name to 'small'"
                )
        return self


TRUNKS: dict[str, Callable[[BackboneConfig], Trunk]] = {
    "small": lambda config: SmallTrunk(config.channels, config.width, config.depth),
    **{name: lambda config: IResNetTrunk(config.channels, iresnet.BLOCKS[config.name]) for name in iresnet.BLOCKS},
    **{name: lambda config: ResNetTrunk(config.channels, resnet.BLOCKS[config.name]) for name in resnet.BLOCKS},
}
"""Our own trunks by name; timm's are looked up when they are built."""


class EmbeddingHead(nn.Sequential):
    """BN-dropout-FC-BN: maps_BCHW of one shape to features_BD.

    Source: Deng et al., "ArcFace", CVPR 2019, section 3.1, option E. As in InsightFace's code the last BatchNorm's
    weight is frozen at 1: the margin normalises the features, so a scale for each dimension would only distort
    the hypersphere; its bias is trained.
    """

    def __init__(self, channels: int, side: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.flatten = nn.Flatten(1)
        self.project = nn.Linear(channels * side * side, embedding_dim)
        self.feature_norm = _frozen_scale_norm(embedding_dim)


class Backbone(nn.Module):
    """A trunk and a head, on images of one shape.

    Attributes:
        image_shape: (channels, side, side) of the images it takes.
        embedding_dim: D.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, config: BackboneConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.image_shape = (config.channels, config.image_size, config.image_size)
        self.embedding_dim = config.embedding_dim
        self.relu = config.relu

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return features_BD, float32 (or autocast's type), not normalised, of images_BCHW, float32."""
        assert images_BCHW.shape[1:] == self.image_shape, (
            f"images are {tuple(images_BCHW.shape[1:])}, the backbone takes {self.image_shape}"
        )
        features_BD: Tensor = self.head(self.trunk(_channels_last(images_BCHW)))
        return nn.functional.relu(features_BD) if self.relu else features_BD


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build the backbone that `config` names, with fresh weights drawn from torch's default generator.

    Returns:
        A module from images_BCHW (float32) to features_BD (float32, not normalised), in training mode.

    Raises:
        ConfigError: timm is asked for and missing, or does not know the network.
    """
    if config.name.startswith(TIMM_PREFIX):
        backbone = Backbone(_timm_trunk(config), _frozen_scale_norm(config.embedding_dim), config)
    else:
        trunk = TRUNKS[config.name](config)
        side = -(-config.image_size // trunk.total_stride)  # every stride-2 step of ours rounds up
        head = EmbeddingHead(trunk.out_channels, side, config.embedding_dim, config.dropout)
        backbone = Backbone(trunk, head, config)
    return backbone


def _channels_last(images_BCHW: Tensor) -> Tensor:
    """The faster layout on CPUs and on tensor cores alike; the maps that follow keep it.

    The weights stay contiguous, as ZeRO's flat buffers need them. A grey image has both layouts at once, and torch
    takes it for the slower one unless the strides say otherwise.
    """
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    samples, channels, height, width = images_BCHW.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return images_BCHW.as_strided((samples, channels, height, width), strides)


def _frozen_scale_norm(embedding_dim: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(embedding_dim)
    norm.weight.requires_grad_(False)
    return norm


def _timm_trunk(config: BackboneConfig) -> nn.Module:
    """Build timm's network with its own pooling and a linear layer to the embedding."""
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision built for another torch
        missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        reason = "is missing" if missing else f"does not import here ({str(error).splitlines()[0]})"
        raise ConfigError(f"backbone {config.name!r} needs the package timm, which {reason}: {_TIMM_HINT}") from None
    name = config.name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        raise ConfigError(_unknown(config.name, [TIMM_PREFIX + known for known in timm.list_models()]))
    options: dict[str, Any] = {}
    if timm.get_pretrained_cfg(name).fixed_input_size:  # transformers with position embeddings; others refuse it
        options["img_size"] = config.image_size
    trunk: nn.Module = timm.create_model(
        name,
        pretrained=False,
        in_chans=config.channels,
        num_classes=config.embedding_dim,
        drop_rate=config.dropout,
        **options,
    )
    return trunk


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    choice = f" (one of {', '.join(known)})" if len(known) <= 20 else ""
    return f"backbone.name {name!r} is not known: did you mean {nearest!r}?{choice}"
