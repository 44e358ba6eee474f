"""Triton kernels of a tile: unit prototypes, scores with the softmax in their epilogue, and back through the length.

Each takes contiguous tensors of any size. They run on NVIDIA GPUs from Ampere on, and on a CPU in Triton's interpreter
(TRITON_INTERPRET=1), where the tests compare them with float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.model.heads import TINY

Mode = int
# What the scores' epilogue does. SUM and ERROR store; MAXIMUM only looks.
MAXIMUM, SUM, ERROR = 0, 1, 2
BLOCK_SAMPLES, BLOCK_ROWS, BLOCK_DIM = 128, 128, 64
ROWS_AT_ONCE = 4  # of the kernels that hold whole prototypes


@triton.jit
def _unit_rows(
    weight, unit, inverse, rows, dim, smallest, NORMALISED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < dim)
    place = row.to(tl.int64)[:, None] * dim + column[None, :]
    value = tl.load(weight + place, mask=inside, other=0.0)
    factor = tl.full((HEIGHT,), 1.0, tl.float32)
    if NORMALISED:
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), smallest)
    tl.store(unit + place, (value * factor[:, None]).to(unit.dtype.element_ty), mask=inside)
    tl.store(inverse + row, factor, mask=row < rows)


@triton.jit
def _scores(
    features,
    unit,
    shift,
    own_column,
    own_value,
    scores,
    partial,
    samples,
    rows,
    dim,
    first,
    scale,
    MODE: tl.constexpr,  # MAXIMUM, SUM or ERROR
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # Triton's interpreter would multiply the bits of bfloat16
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    sample = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    left = features + sample[:, None] * dim + depth[None, :]
    right = unit + row[None, :] * dim + depth[:, None]
    logit = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, dim, DEPTH):
        ahead = depth < dim - start
        a = tl.load(left + start, mask=(sample[:, None] < samples) & ahead[None, :], other=0.0)
        b = tl.load(right + start, mask=(row[None, :] < rows) & ahead[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        logit = tl.dot(a, b, logit, input_precision=PRECISION)
    logit = logit * scale
    inside = row[None, :] < rows
    own = tl.load(own_column + sample, mask=sample < samples, other=-1)
    is_own = (row[None, :] + first) == own[:, None]
    if MODE == 0:
        lowest = tl.full((HEIGHT, WIDTH), float("-inf"), tl.float32)
        found = tl.max(tl.where(inside & (is_own == 0), logit, lowest), axis=1)
        # Triton's maximum may drop a NaN; a sum does not.
        broken = tl.sum(tl.where(inside & (logit != logit), logit, 0.0), axis=1)
        tl.store(partial + tl.program_id(0) * samples + sample, found + broken, mask=sample < samples)
    else:
        off = tl.load(shift + sample, mask=sample < samples, other=0.0)
        others = inside & (is_own == 0)
        share = tl.exp(tl.where(others, logit - off[:, None], 0.0))  # the own logit may be far above them
        if MODE == 1:
            share = tl.where(others, share, 0.0)
            tl.store(partial + tl.program_id(0) * samples + sample, tl.sum(share, axis=1), mask=sample < samples)
        else:
            value = tl.load(own_value + sample, mask=sample < samples, other=0.0)
            share = tl.where(is_own, value[:, None], share)
        place = scores + sample.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(place, share.to(scores.dtype.element_ty), mask=(sample[:, None] < samples) & inside)


@triton.jit
def _through_unit(gradient, weight, inverse, rows, dim, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < dim)
    place = row.to(tl.int64)[:, None] * dim + column[None, :]
    factor = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    unit = tl.load(weight + place, mask=inside, other=0.0) * factor
    value = tl.load(gradient + place, mask=inside, other=0.0)
    along = tl.sum(value * unit, axis=1)
    tl.store(gradient + place, (value - unit * along[:, None]) * factor, mask=inside)


def unit_rows(weight_TD: Tensor, normalised: bool, unit_TD: Tensor, inverse_T1: Tensor) -> None:
    """Fill `unit_TD`, in its own precision, with the prototypes at length 1 (or as they are).

    `inverse_T1`, float32, takes the factors that make them so.
    """
    rows, dim = weight_TD.shape
    grid, width = (triton.cdiv(rows, ROWS_AT_ONCE),), triton.next_power_of_2(dim)
    _unit_rows[grid](weight_TD, unit_TD, inverse_T1, rows, dim, TINY, normalised, ROWS_AT_ONCE, width)


def scores(
    mode: Mode,
    features_BD: Tensor,
    unit_TD: Tensor,
    shift_B: Tensor,
    own_column_B: Tensor,
    own_value_B: Tensor,
    scores_BT: Tensor,
    first: int,
    scale: float,
) -> Tensor:
    """Logits of a tile, and in the same breath what becomes of them.

    Args:
        mode: MAXIMUM, SUM or ERROR.
        features_BD, unit_TD: in one precision, float32 or bfloat16; their products are summed in float32.
        shift_B: float32, taken off the logits before the exponential.
        own_column_B: int64, the own prototype's place, counted from the tile that begins at `first`.
        own_value_B: float32, what ERROR stores there; MAXIMUM and SUM leave it out.
        scores_BT: takes exp(logit - shift), in its own precision.
        first: place of the tile's first prototype.
        scale: factor on the products.

    Returns:
        (blocks of rows, B) float32: maxima or sums over each block; undefined for ERROR.
    """
    (samples, dim), rows = features_BD.shape, len(unit_TD)
    blocks = triton.cdiv(rows, BLOCK_ROWS)
    partial = shift_B.new_empty(blocks, samples)
    _scores[(blocks, triton.cdiv(samples, BLOCK_SAMPLES))](
        features_BD,
        unit_TD,
        shift_B,
        own_column_B,
        own_value_B,
        scores_BT,
        partial,
        samples,
        rows,
        dim,
        first,
        scale,
        mode,
        "ieee" if features_BD.dtype == torch.float32 else "tf32",  # of bfloat16 products there is one precision
        not features_BD.is_cuda,
        BLOCK_SAMPLES,
        BLOCK_ROWS,
        BLOCK_DIM if features_BD.dtype == torch.bfloat16 else BLOCK_DIM // 2,
        num_warps=8,
        num_stages=3,
    )
    return partial


def through_unit(gradient_TD: Tensor, weight_TD: Tensor, inverse_T1: Tensor) -> None:
    """Turn, in place, the gradient by unit prototypes into that by the prototypes; see `heads.through_unit_`."""
    rows, dim = weight_TD.shape
    grid, width = (triton.cdiv(rows, ROWS_AT_ONCE),), triton.next_power_of_2(dim)
    _through_unit[grid](gradient_TD, weight_TD, inverse_T1, rows, dim, ROWS_AT_ONCE, width)
