"""Blocks are given out again, and never while anything of a tensor is left."""

from __future__ import annotations

import gc

import torch
import torch.nn.functional as F

from pipeline.data.kept_memory import KEPT, KeptMemory


def test_memory_comes_back_once_its_tensor_is_gone() -> None:
    memory = KeptMemory((5, 3, 2))
    first = memory.tensor(5)
    place = first.data_ptr()
    second = memory.tensor(3)
    assert second.shape == (3, 3, 2)
    assert second.dtype == torch.float32
    assert second.data_ptr() != place
    del first
    assert memory.tensor(4).data_ptr() == place


def test_a_view_an_array_and_a_graph_hold_it() -> None:
    memory = KeptMemory((4, 6))
    weight = torch.ones(2, 6, requires_grad=True)
    held = []
    for hold in (lambda one: one.permute(1, 0)[2:], lambda one: one.numpy(), lambda one: F.linear(one, weight)):
        one = memory.tensor(4).fill_(7.0)
        place = one.data_ptr()
        held.append(hold(one))
        del one
        gc.collect()
        assert memory.tensor(4).data_ptr() != place
    memory.tensor(4).fill_(0.0)
    assert (held[0] == 7).all()
    assert (held[1] == 7).all()
    held[2].sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 28).all(), "the graph's own input is what it was"


def test_whoever_keeps_all_gets_fresh_memory() -> None:
    memory = KeptMemory((2, 2))
    kept = [memory.tensor(2).fill_(float(number)) for number in range(3 * KEPT)]
    assert len({one.data_ptr() for one in kept}) == 3 * KEPT
    assert all((one == number).all() for number, one in enumerate(kept))
    kept.clear()
    assert len({memory.tensor(2).data_ptr() for _ in range(3 * KEPT)}) <= KEPT
