"""Margin softmax: what is done to the logit of a sample's own identity.

One formula covers the field: with theta the angle between a feature and its prototype,

    logit_target = scale * (psi(m1 * theta + m2) - m3)

SphereFace (m1), ArcFace (m2; Deng et al., CVPR 2019, Eq. 3 and 4), CosFace (m3; Wang et al., CVPR 2018, Eq. 4),
norm-softmax (no margin) and, with neither side normalised, the plain softmax.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.schema import Config

# Keeps sin(theta) away from zero, where the derivative of acos diverges.
COSINE_LIMIT = 1.0 - 1e-6


class MarginConfig(Config):
    """How features and prototypes become logits.

    `name` sets which of the margins must be given: `cosface` m3, `arcface` m2, `combined` any of the three;
    `softmax` and `norm_softmax` have none.
    """

    name: Literal["cosface", "arcface", "combined", "norm_softmax", "softmax"] = Field(
        "cosface", description="the named setting"
    )
    scale: float = Field(20.0, gt=0, description="factor on the cosines; 1 for the plain softmax")
    m1: float = Field(1.0, ge=1, le=4, description="SphereFace's multiple of the angle")
    m2: float = Field(0.0, ge=0, lt=math.pi, description="ArcFace's angle, radians")
    m3: float = Field(0.0, ge=0, lt=2, description="CosFace's cosine")

    @model_validator(mode="after")
    def _margins_fit_the_name(self) -> Self:
        allowed = {"cosface": {"m3"}, "arcface": {"m2"}, "combined": {"m1", "m2", "m3"}}.get(self.name, set())
        given = {key for key, neutral in (("m1", 1.0), ("m2", 0.0), ("m3", 0.0)) if getattr(self, key) != neutral}
        if extra := sorted(given - allowed):
            raise ValueError(f"margin {self.name!r} takes no {', '.join(extra)}; use 'combined' to mix margins")
        if self.name in ("cosface", "arcface") and not given:
            raise ValueError(f"margin {self.name!r} needs {allowed.pop()} above 0; 'norm_softmax' is the one without")
        if self.name == "softmax" and self.scale != 1.0:
            raise ValueError("margin 'softmax' has unnormalised logits: scale must be 1")
        return self

    @property
    def normalised(self) -> bool:
        """Whether features and prototypes are scaled to length 1 before their product."""
        return self.name != "softmax"


def apply_margin(cosine_B: Tensor, margin: MarginConfig) -> tuple[Tensor, Tensor]:
    """Logit of the sample's own identity and its derivative.

    Past pi, psi(phi) = (-1)^k cos(phi) - 2k with k = floor(phi / pi) (SphereFace, Liu et al., CVPR 2017, Eq. 7),
    so that it goes on falling as the angle grows, is continuous, and its derivative never changes sign.

    Args:
        cosine_B: (B,) cosines (or plain products for the unnormalised softmax) of samples and own prototypes.
        margin: the setting.

    Returns:
        (B,) logits and (B,) d logit / d cosine, the true derivative.
    """
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return margin.scale * (cosine_B - margin.m3), torch.full_like(cosine_B, margin.scale)
    cosine_B = cosine_B.clamp(-COSINE_LIMIT, COSINE_LIMIT)
    theta_B = torch.acos(cosine_B)
    phi_B = margin.m1 * theta_B + margin.m2
    turns_B = torch.floor(phi_B / math.pi)
    sign_B = 1.0 - 2.0 * (turns_B % 2)
    psi_B = sign_B * torch.cos(phi_B) - 2.0 * turns_B
    slope_B = margin.m1 * sign_B * torch.sin(phi_B) / torch.sqrt(1.0 - cosine_B * cosine_B)
    return margin.scale * (psi_B - margin.m3), margin.scale * slope_B
