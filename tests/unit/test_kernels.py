"""Triton's kernels in its interpreter (on a GPU where there is one), and all implementations, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.model.heads import Head, HeadBatch, combine, feature_gradient, statistics
from pipeline.model.implementations import Precision, blocked, choose, kernels, triton_tiles
from pipeline.model.margins import MarginConfig
from tests.dense import dense_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1, 1), (3, 129, 17), (130, 257, 65), (7, 5, 128)]  # samples, rows, dimension: none fills its block
PRECISIONS = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output with a margin behind it that nobody may touch."""
    whole = torch.full((shape[0] + 1, *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
    return whole[: shape[0]]


def untouched_behind(tensor: Tensor) -> bool:
    behind = tensor.as_strided((tensor[0].numel(),), (1,), tensor.storage_offset() + tensor.numel())
    return bool(behind.isnan().all())


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 17), (129, 64), (6, 513)])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unit_rows(rows: int, dim: int, normalised: bool, precision: torch.dtype) -> None:
    weight, unit, inverse = draw(rows, dim), poisoned(rows, dim, dtype=precision), poisoned(rows, 1)
    kernels.unit_rows(weight, normalised, unit, inverse)
    length = weight.double().norm(dim=1, keepdim=True) if normalised else torch.ones(rows, 1, device=DEVICE).double()
    torch.testing.assert_close(inverse.double(), 1 / length, rtol=1e-6, atol=0)
    tolerance = 1e-6 if precision == torch.float32 else 2**-7
    torch.testing.assert_close(unit.double(), weight.double() / length, rtol=tolerance, atol=1e-9)
    assert untouched_behind(unit)
    assert untouched_behind(inverse)


@pytest.mark.parametrize(("samples", "rows", "dim"), SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [kernels.MAXIMUM, kernels.SUM, kernels.ERROR])
def test_scores(samples: int, rows: int, dim: int, precision: torch.dtype, mode: int) -> None:
    first, scale = 40, 3.0
    features, unit = draw(samples, dim).to(precision), draw(rows, dim, seed=1).to(precision)
    unit = unit / dim**0.5
    shift, own_value = draw(samples, seed=2), draw(samples, seed=3)
    generator = torch.Generator().manual_seed(4)
    own = torch.randint(first - 5, first + rows + 5, (samples,), generator=generator).to(DEVICE)
    scores = poisoned(samples, rows, dtype=precision)
    partial = kernels.scores(mode, features, unit, shift, own, own_value, scores, first, scale)

    logits = scale * features.double() @ unit.double().T
    is_own = torch.arange(first, first + rows, device=DEVICE) == own[:, None]
    share = torch.exp(logits - shift.double()[:, None])
    if mode == kernels.MAXIMUM:
        expected = logits.masked_fill(is_own, -torch.inf).amax(dim=1)
        torch.testing.assert_close(partial.amax(dim=0).double(), expected, rtol=1e-5, atol=1e-5)
        assert scores.isnan().all(), "it only looks"
        return
    if mode == kernels.SUM:
        share = share.masked_fill(is_own, 0.0)
        torch.testing.assert_close(partial.sum(dim=0).double(), share.sum(dim=1), rtol=1e-5, atol=1e-6)
    else:
        share = torch.where(is_own, own_value.double()[:, None], share)
    tolerance = 1e-5 if precision == torch.float32 else 2**-7
    torch.testing.assert_close(scores.double(), share, rtol=tolerance, atol=1e-6)
    assert untouched_behind(scores)


def test_scores_do_not_lose_a_nan() -> None:
    features, unit, shift = draw(3, 4), draw(5, 4, seed=1), torch.zeros(3, device=DEVICE)
    features[1, 2] = torch.nan
    own = torch.full((3,), -1, device=DEVICE)
    for mode in (kernels.MAXIMUM, kernels.SUM):
        partial = kernels.scores(mode, features, unit, shift, own, shift, poisoned(3, 5), 0, 1.0)
        assert partial.sum(dim=0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 17), (129, 64)])
def test_through_unit(rows: int, dim: int) -> None:
    weight = draw(rows, dim).double().requires_grad_()
    gradient = draw(rows, dim, seed=1)
    torch.nn.functional.normalize(weight).backward(gradient.double())
    assert weight.grad is not None
    buffer = poisoned(rows, dim)
    buffer.copy_(gradient)
    inverse = (1 / weight.detach().norm(dim=1, keepdim=True)).float()
    kernels.through_unit(buffer, weight.detach().float(), inverse)
    torch.testing.assert_close(buffer.double(), weight.grad, rtol=1e-4, atol=1e-5)
    assert untouched_behind(buffer)


MARGINS = [
    MarginConfig(name="cosface", scale=16.0, m3=0.2),
    MarginConfig(name="arcface", scale=90.0, m2=0.3),  # beyond the scale that needs no maximum
    MarginConfig(name="softmax", scale=1.0),
]


@pytest.mark.parametrize("margin", MARGINS, ids=lambda margin: margin.name)
@pytest.mark.parametrize(("samples", "rows", "dim"), [(13, 101, 19), (2, 1, 3), (1, 40, 7), (5, 39, 130)])
@pytest.mark.parametrize(
    ("name", "precision"), [("dense", "fp32"), ("blocked", "fp32"), ("triton", "fp32"), ("triton", "bf16")]
)
def test_both_passes_are_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch,
    margin: MarginConfig,
    samples: int,
    rows: int,
    dim: int,
    name: str,
    precision: Precision,
) -> None:
    monkeypatch.setattr(blocked, "TILE_ROWS", 40)
    monkeypatch.setattr(triton_tiles, "TILE_ROWS", 40)
    weight, features = draw(rows, dim), draw(samples, dim, seed=1)
    labels = torch.randint(rows, (samples,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels[samples // 2] = -1 if samples > 2 else labels[0]  # one sample has no prototype; or two have the same
    sample_weight = torch.rand(samples, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    batch = HeadBatch.of(Head("v1", weight, torch.arange(rows, device=DEVICE), margin), features, labels)
    implementation = choose(name, precision, torch.device(DEVICE))  # type: ignore[arg-type]
    scan = implementation.scan(batch)
    log_sum_exp, own, known = (each[0] for each in combine(statistics(batch, scan)[None, None]))
    weight_gradient = poisoned(rows, dim)

    def sink(first: int, gradient_TD: Tensor) -> None:
        assert weight_gradient[first : first + len(gradient_TD)].isnan().all(), "each prototype once"
        weight_gradient[first : first + len(gradient_TD)] = gradient_TD

    implementation.weight_gradient(batch, scan, log_sum_exp, sample_weight * known, sink)
    gradient = feature_gradient(batch, scan, log_sum_exp, sample_weight * known)

    exact_weight, exact_features = (tensor.double().requires_grad_() for tensor in (weight, features))
    logits = dense_logits(exact_features, exact_weight, labels, margin)
    wanted = torch.logsumexp(logits, dim=1)
    losses = wanted - logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    (losses * sample_weight * known).sum().backward()
    assert exact_features.grad is not None
    assert exact_weight.grad is not None
    bound = 2e-5 if precision == "fp32" else 0.2  # eight bits of mantissa, times a scale of 90
    largest = float(logits.detach().abs().max())
    torch.testing.assert_close(log_sum_exp.double(), wanted.detach(), rtol=0.0, atol=bound * largest)
    for got, exact in ((gradient, exact_features.grad), (weight_gradient, exact_weight.grad)):
        torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=bound * max(1e-3, float(exact.abs().max())))
    assert untouched_behind(weight_gradient)
    assert own[known].isfinite().all()


def test_device_and_config_choose_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert type(choose("auto", "fp32", cpu)).__name__ == "Blocked"
    assert type(choose("auto", "bf16", gpu)).__name__ == "TritonTiles"
    assert type(choose("dense", "fp32", gpu)).__name__ == "Dense"
    with pytest.raises(ConfigError, match="'bf16' needs the triton implementation, not 'blocked' on cpu"):
        choose("auto", "bf16", cpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose("triton", "fp32", cpu)
