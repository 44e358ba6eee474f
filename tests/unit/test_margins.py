"""Margins: the logit, its true derivative, and what happens past pi."""

from __future__ import annotations

import math

import pydantic
import pytest
import torch

from pipeline.model.margins import MarginConfig, apply_margin

COMBINED = MarginConfig(name="combined", scale=3.0, m1=2.0, m2=0.4, m3=0.1)
ARCFACE = MarginConfig(name="arcface", scale=8.0, m2=0.5)
COSFACE = MarginConfig(name="cosface", scale=16.0, m3=0.35)


@pytest.mark.parametrize("margin", [COMBINED, ARCFACE, COSFACE], ids=lambda margin: margin.name)
def test_slope_is_the_derivative_of_the_logit(margin: MarginConfig) -> None:
    cosine_B = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64)
    _, slope_B = apply_margin(cosine_B, margin)
    step = 1e-7
    above_B, below_B = (apply_margin(cosine_B + sign * step, margin)[0] for sign in (1, -1))
    numeric_B = (above_B - below_B) / (2 * step)
    torch.testing.assert_close(slope_B, numeric_B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("margin", [COMBINED, ARCFACE, COSFACE], ids=lambda margin: margin.name)
def test_logit_falls_all_the_way_as_the_angle_grows(margin: MarginConfig) -> None:
    theta_B = torch.linspace(0.01, math.pi - 0.01, 1000, dtype=torch.float64)
    logit_B, slope_B = apply_margin(torch.cos(theta_B), margin)
    assert (logit_B.diff() < 0).all(), "also where m1 * theta + m2 passes pi"
    assert (slope_B >= 0).all()
    assert logit_B.diff().abs().max() < 0.2, "and without a jump"


def test_logits_are_those_of_the_papers_below_pi() -> None:
    cosine_B = torch.tensor([0.9, 0.3, -0.5], dtype=torch.float64)
    torch.testing.assert_close(apply_margin(cosine_B, COSFACE)[0], 16.0 * (cosine_B - 0.35))
    torch.testing.assert_close(apply_margin(cosine_B, ARCFACE)[0], 8.0 * torch.cos(torch.acos(cosine_B) + 0.5))
    plain = MarginConfig(name="softmax", scale=1.0)
    torch.testing.assert_close(apply_margin(7 * cosine_B, plain)[0], 7 * cosine_B)


@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0000001])
def test_edges_are_finite(cosine: float) -> None:
    logit_B, slope_B = apply_margin(torch.tensor([cosine]), ARCFACE)
    assert torch.isfinite(logit_B).all()
    assert torch.isfinite(slope_B).all()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": "softmax", "scale": 20.0}, "scale must be 1"),
        ({"name": "softmax", "scale": 1.0, "m3": 0.1}, "takes no m3"),
        ({"name": "cosface"}, "needs m3 above 0"),
        ({"name": "arcface", "m2": 4.0}, "less than"),
        ({"name": "norm_softmax", "m2": 0.1}, "takes no m2"),
    ],
)
def test_margins_that_do_not_fit_the_name_are_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=told):
        MarginConfig.model_validate(fields)
