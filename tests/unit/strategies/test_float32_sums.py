"""Sums of bfloat16 gradients over many passes: against float64, and against what autograd leaves by itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loqt_scale.strategies.float32_sums import Float32Sums


class Pieces(nn.Module):
    """Two linears, of which a pass may leave one unused, as experts may be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.now_and_then = (nn.Linear(16, 8, dtype=torch.bfloat16) for _ in range(2))

    def loss(self, x: Tensor, *, both: bool) -> Tensor:
        y = self.always(x) + (self.now_and_then(x) if both else 0.0)
        return (y * y).sum()


def take_passes(model: Pieces, passes: int, used: list[bool], sums: Float32Sums | None) -> dict[str, Tensor]:
    """Float64 sums of every pass's gradients, each taken by itself; those of `model` are left in `.grad`."""
    exact: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for index in range(passes):
        x, both = torch.randn(4, 16, generator=generator).bfloat16(), used[index % len(used)]
        names = [(name, p) for name, p in model.named_parameters() if both or name.startswith("always")]
        alone = torch.autograd.grad(model.loss(x, both=both), [p for _, p in names])
        for (name, _), gradient in zip(names, alone, strict=True):
            exact[name] = exact.get(name, torch.zeros(())) + gradient.double()
        if sums is None:
            model.loss(x, both=both).backward()
            continue
        with sums.one_pass(last=index == passes - 1):
            model.loss(x, both=both).backward()
    return exact


def worst_error(model: Pieces, exact: dict[str, Tensor]) -> float:
    """Norm of the error over norm of the sum, of the parameter with the greatest."""
    errors = []
    for name, parameter in model.named_parameters():
        if name in exact:
            assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
            errors.append(float((parameter.grad.double() - exact[name]).norm() / exact[name].norm()))
    return max(errors)


def test_512_passes_are_rounded_once() -> None:
    """By autograd alone they are 1% wrong and more."""
    model = Pieces()
    assert worst_error(model, take_passes(model, 512, [True], None)) > 0.01
    model.zero_grad()
    sums = Float32Sums(model.parameters(), lambda tensor: tensor)
    assert worst_error(model, take_passes(model, 512, [True], sums)) < 2**-8
    assert not sums._sums


@settings(max_examples=20, deadline=None)
@given(passes=st.integers(1, 9), used=st.lists(st.booleans(), min_size=1, max_size=3))
def test_what_the_last_pass_leaves_unused_is_not_lost(passes: int, used: list[bool]) -> None:
    model = Pieces()
    sums = Float32Sums(model.parameters(), lambda tensor: tensor)
    assert worst_error(model, take_passes(model, passes, used, sums)) < 2**-8


def test_between_passes_there_are_float32_sums_and_no_gradients() -> None:
    model = Pieces()
    sums = Float32Sums(model.parameters(), lambda tensor: tensor)
    with sums.one_pass(last=False):
        model.loss(torch.ones(4, 16, dtype=torch.bfloat16), both=True).backward()
    assert all(p.grad is None for p in model.parameters())
    assert {p.shape for p in model.parameters()} == {total.shape for total in sums._sums.values()}
    assert {total.dtype for total in sums._sums.values()} == {torch.float32}


@pytest.mark.parametrize("passes", [1, 3])
def test_the_last_pass_may_join_its_gradients_in_a_bucket(passes: int) -> None:
    """As DDP has them: one behind the other, in an order of its own."""
    model = Pieces()
    sums = Float32Sums(model.parameters(), lambda tensor: tensor, last_apart=True)
    parameters = list(reversed(list(model.parameters())))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    for index in range(passes):
        with sums.one_pass(last=index == passes - 1):
            model.loss(x, both=True).backward()
            if index == passes - 1:
                bucket = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                total = sums.join(parameters, bucket)
    assert total.dtype == torch.float32 and torch.equal(total, passes * bucket.float())
    assert not sums._sums


def test_sums_keep_no_model_alive() -> None:
    model = Pieces()
    sums = Float32Sums(model.parameters(), lambda tensor: tensor)
    with sums.one_pass(last=True):
        model.loss(torch.ones(4, 16, dtype=torch.bfloat16), both=True).backward()
    there = weakref.ref(model)
    del model, sums
    gc.collect()
    assert there() is None
