"""AdamW with few bits: against torch's AdamW, naive quantization and the law of large numbers."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loqt_scale.config.blocks import row_block
from loqt_scale.errors import UserError
from loqt_scale.functional.blockwise import decode, encode, level_tables
from loqt_scale.functional.rounding import seed_of_update, stochastic_bfloat16
from loqt_scale.optim import StreamedAdamW, UpdateInBackward, fragment, open_moments, step_if_finite

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make(parameters: list[nn.Parameter], states: str, first_row: int = 0) -> StreamedAdamW:
    groups = [{"params": [p], "lr": 0.01 * (1 + i)} for i, p in enumerate(parameters)]
    same = {"local": lambda tensor: tensor, "first_row": lambda _: first_row, "seed": 3}
    return StreamedAdamW(groups, **SETTINGS, states=states, **same)


def parameters_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((48, 64), (70,), (5, 8, 3))]


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        scale = torch.exp(2.0 * torch.randn(p.shape, generator=generator))  # decades of sizes in a block
        p.grad = (torch.randn(p.shape, generator=generator) * scale * 1e-3).to(p.dtype)


def test_float32_states_are_torch_adamw() -> None:
    """Weights of three shapes, in chunks that do not divide their rows."""
    ours, theirs = parameters_of(), parameters_of()
    groups = [{"params": [p], "lr": 0.01 * (1 + i)} for i, p in enumerate(theirs)]
    optimizer, reference = make(ours, "float32"), torch.optim.AdamW(groups, **SETTINGS)
    with mock.patch.object(fragment, "CHUNK_VALUES", 7 * 64):
        for step in range(20):
            gradients(ours, step)
            gradients(theirs, step)
            optimizer.step()
            reference.step()
    for mine, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, theirs_, rtol=1e-5, atol=1e-6)


def test_int8_states_follow_adamw_and_take_a_quarter() -> None:
    ours, theirs = parameters_of()[:1], parameters_of()[:1]
    start = theirs[0].detach().clone()
    optimizer, reference = make(ours, "int8"), torch.optim.AdamW(theirs, lr=0.01, **SETTINGS)
    for step in range(50):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        reference.step()
    moved = (theirs[0] - start).norm()
    assert (ours[0] - theirs[0]).norm() < 0.1 * moved
    state = optimizer.state[ours[0]]
    held = sum(t.nbytes for key in ("exp_avg", "exp_avg_sq") for t in state[key].tensors())
    assert held == 2 * 48 * (64 + 4), "one byte a value, one float32 scale a block of 64"


def everything(optimizer: StreamedAdamW, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Copies of weights, step counts and what moments are kept in."""
    states = [optimizer.state[p] for p in parameters]
    kept = [t for state in states for key in ("exp_avg", "exp_avg_sq") for t in state[key].tensors()]
    return [t.detach().clone() for t in (*parameters, *(state["step"] for state in states), *kept)]


@pytest.mark.parametrize("states", ["float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_leaves_every_bit(states: str, dtype: torch.dtype) -> None:
    """And the next update is the one that would have come: same count, same noise of the rounding."""
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    optimizer, never_skipped = make(ours, states), make(theirs, states)
    for step in range(4):
        for parameters, updated in ((ours, optimizer), (theirs, never_skipped)):
            gradients(parameters, step)
            step_if_finite(updated, torch.tensor(1.0))
        before = everything(optimizer, ours)
        for bad in (torch.nan, torch.inf):
            assert ours[0].grad is not None
            ours[0].grad[3, 5] = bad
            step_if_finite(optimizer, torch.tensor(bad))
        assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer, ours), strict=True))
    for a, b in zip(everything(optimizer, ours), everything(never_skipped, theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_a_state_dict_is_plain_and_goes_on_to_the_last_bit(states: str) -> None:
    """Through a file that torch reads without running anything; into another optimizer, and back in the same one."""
    ours, others = parameters_of(), parameters_of()
    optimizer, other = make(ours, states), make(others, states)
    weights: list[torch.Tensor] = []
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            weights = [p.detach().clone() for p in ours]
        gradients(ours, step)
        optimizer.step()
    expected = everything(optimizer, ours)
    for parameters, loaded in ((others, other), (ours, optimizer)):
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        for step in range(3, 6):
            gradients(parameters, step)
            loaded.step()
        assert all(torch.equal(a, b) for a, b in zip(everything(loaded, parameters), expected, strict=True))
    saved = other.state_dict()
    names = {index: f"weight.{index}" for index in range(3)}  # as torch.distributed.checkpoint calls parameters
    renamed = [{**group, "params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
    moments = {names[index]: own for index, own in saved["state"].items()}
    optimizer.load_state_dict({"state": moments, "param_groups": renamed})
    assert all(torch.equal(a, b) for a, b in zip(everything(optimizer, ours), expected, strict=True))
    with pytest.raises(UserError, match=r"moments of weight\.0, which no group holds"):
        optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
    assert (
        saved["state"][0]["exp_avg_sq"].shape == (48, 64) and make(parameters_of(), states).state_dict()["state"] == {}
    )
    saved["state"][1]["exp_avg"] = torch.zeros(35)
    with pytest.raises(
        UserError, match=r"of parameter 1 the state has \(35,\) for 'exp_avg', but this rank holds \(70,\)"
    ):
        other.load_state_dict(saved)
    del saved["state"][1]["exp_avg"]
    with pytest.raises(UserError, match="the state has nothing for 'exp_avg'"):
        other.load_state_dict(saved)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    block=st.sampled_from([32, 64, 256]),
    size=st.sampled_from([1e-12, 1e-3, 1e5]),
    signed=st.booleans(),
)
def test_codes_are_the_nearest_levels_and_idempotent(
    seed: int, rows: int, blocks: int, block: int, size: float, signed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, blocks * block, generator=generator).pow(3) * size
    values[torch.rand(rows, generator=generator) < 0.2] = 0.0
    values = values if signed else values.abs()
    codes, scales = encode(values, block, signed=signed)
    assert codes.shape == values.shape and scales.shape == (rows, blocks)
    levels, _ = level_tables(signed, torch.device("cpu"))
    unit = values.double().reshape(rows, blocks, block) / scales.double().clamp_min(1e-38).unsqueeze(2)
    nearest = (unit.unsqueeze(3) - levels.double()).abs().amin(3)
    got = decode(codes, scales, signed=signed)
    error = (got.double().reshape(unit.shape) / scales.double().clamp_min(1e-38).unsqueeze(2) - unit).abs()
    assert bool((error <= nearest + 1e-6).all())
    again = encode(got, block, signed=signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    part = encode(values[1:], block, signed=signed)  # a shard of the rows
    assert torch.equal(part[0], codes[1:]) and torch.equal(part[1], scales[1:])


def test_rows_are_cut_where_they_can_be() -> None:
    assert [row_block(n) for n in (1, 8, 32, 96, 128, 512, 1376)] == [0, 0, 32, 32, 128, 256, 32]
    assert [row_block(n) for n in (48, 172, 86, 100, 37, 298, 257)] == [48, 172, 86, 100, 37, 149, 0]


@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_rounding_is_unbiased_and_to_a_neighbour(seed: int, size: float) -> None:
    values = torch.full((200_000,), size) * 1.00123
    rounded = stochastic_bfloat16(values, seed=seed, first_index=5)
    down, up = size * 1.00123 / (1 + 2**-7), size * 1.00123 * (1 + 2**-7)
    assert bool(((rounded.double() > down) & (rounded.double() < up)).all()) and len(rounded.unique()) == 2
    assert float(rounded.double().mean()) == pytest.approx(float(values[0]), rel=5e-5)
    shard = stochastic_bfloat16(values[1000:2000], seed=seed, first_index=1005)
    assert torch.equal(shard, rounded[1000:2000])


def test_every_update_has_a_noise_of_its_own() -> None:
    """Seeds from counts in a tensor; neighbouring counts' noises are not correlated, nor shifted by an element."""
    values = torch.full((100_000,), 1.00123)
    up = [
        (stochastic_bfloat16(values, seed=seed_of_update(7, torch.tensor(float(n))), first_index=0) > 1.001).float()
        for n in (1, 2, 1)
    ]
    assert torch.equal(up[0], up[2])
    a, b = (noise - noise.mean() for noise in up[:2])
    for shift in (0, 1, -1):
        assert abs(float((a * b.roll(shift)).mean() / (a.std() * b.std()))) < 0.015


def test_rounding_leaves_exact_and_infinite_values_alone() -> None:
    values = torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan])
    rounded = stochastic_bfloat16(values, seed=1, first_index=0)
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    """1000 updates of 1e-4 on weights of 1: rounding to nearest would leave them where they are."""
    parameter = nn.Parameter(torch.ones(16, 64, dtype=torch.bfloat16))
    same: dict[str, Any] = {"local": lambda tensor: tensor, "first_row": lambda _: 0, "seed": 0}
    options: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "states": "int8"}
    optimizer = StreamedAdamW([{"params": [parameter], "lr": 1e-4}], **options, **same)
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(parameter.float().mean()) == pytest.approx(0.9, abs=3e-3)
    assert torch.equal(torch.tensor(1.0 - 1e-4).bfloat16(), torch.tensor(1.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_rows_make_the_same_updates(dtype: torch.dtype) -> None:
    whole = parameters_of(dtype)[:1]
    optimizer = make(whole, "int8")
    parts = [nn.Parameter(whole[0].detach()[rows].clone()) for rows in (slice(0, 17), slice(17, 48))]
    optimizers = [make([part], "int8", first_row=first) for part, first in zip(parts, (0, 17), strict=True)]
    for step in range(5):
        gradients(whole, step)
        assert whole[0].grad is not None
        for part, rows, of_part in zip(parts, (slice(0, 17), slice(17, 48)), optimizers, strict=True):
            part.grad = whole[0].grad[rows].clone()
            of_part.step()
        optimizer.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole[0].detach())


def test_moments_can_be_edited_and_survive_float32() -> None:
    parameter = parameters_of()[0]
    optimizer = make([parameter], "int8")
    with open_moments(optimizer, parameter, lambda tensor: tensor) as moments:
        assert moments is None
    gradients([parameter], 0)
    optimizer.step()
    codes = [t.clone() for key in ("exp_avg", "exp_avg_sq") for t in optimizer.state[parameter][key].tensors()]
    with open_moments(optimizer, parameter, lambda tensor: tensor) as moments:
        assert moments is not None
        kept = [moment.clone() for moment in moments]
    with open_moments(optimizer, parameter, lambda tensor: tensor) as moments:
        assert moments is not None
        for moment, value in zip(moments, kept, strict=True):
            moment.copy_(value)
    after = [t for key in ("exp_avg", "exp_avg_sq") for t in optimizer.state[parameter][key].tensors()]
    assert all(torch.equal(a, b) for a, b in zip(codes, after, strict=True))


def test_updates_in_the_backward_pass_equal_those_after_it() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))

    inside, after = model(), model()
    optimizers = [make(list(m.parameters()), "int8") for m in (inside, after)]
    hooks = UpdateInBackward(inside.parameters(), optimizers[0], lambda tensor: tensor)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        for module in (inside, after):
            module(x).square().sum().backward()
        assert all(p.grad is None for p in inside.parameters())
        squares = sum(p.grad.square().sum() for p in after.parameters() if p.grad is not None)
        torch.testing.assert_close(hooks.take_squares(), squares)
        optimizers[1].step()
        optimizers[1].zero_grad()
    for mine, theirs in zip(inside.parameters(), after.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_hooks_keep_no_model_alive() -> None:
    """Python's garbage collector does not see through the hooks of a tensor."""
    model = nn.Linear(64, 3)
    hooks = UpdateInBackward(model.parameters(), make(list(model.parameters()), "int8"), lambda tensor: tensor)
    model(torch.randn(2, 64)).sum().backward()
    assert model.weight.grad is None and float(hooks.take_squares()) > 0.0
    there = weakref.ref(model)
    del model, hooks
    gc.collect()
    assert there() is None
