"""AdamW on fragments in a flat tensor, as under ZeRO: against whole parameters, and a naive twin in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loqt_scale.config.blocks import row_block
from loqt_scale.functional.blockwise import block_runs, level_tables
from loqt_scale.optim import Fragment, Moment, StreamedAdamW, fragment, step_if_finite

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
RATE = 0.01
SHAPES = [(5, 64), (7,), (3, 96), (9, 32), (4, 10)]  # rows of one, no, three, one and no blocks
STEPS = 4


def optimizer_of(tensors: list[Tensor], states: str) -> StreamedAdamW:
    groups = [{"params": tensors, "lr": RATE}]
    same: dict[str, Any] = {"local": lambda tensor: tensor, "first_row": lambda _: 0, "seed": 3}
    return StreamedAdamW(groups, **SETTINGS, states=states, **same)


def parameters_of(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients_of(seed: int) -> list[list[Tensor]]:
    """By step and parameter; decades of sizes in a block."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).pow(3) * 1e-3

    return [[draw(shape) for shape in SHAPES] for _ in range(STEPS)]


def cut_flat(parameters: list[nn.Parameter], cuts: list[int], padding: int) -> list[tuple[Tensor, list[Fragment]]]:
    """The parameters one after the other, cut at these places, each part with padding of ones in front and behind."""
    whole = torch.cat([p.detach().reshape(-1) for p in parameters])
    bounds = [0, *sorted(cuts), whole.numel()]
    parts = []
    for start, stop in pairwise(bounds):
        ones = torch.ones(padding)
        flat, fragments, begin = torch.cat([ones, whole[start:stop], ones]), [], 0
        for p in parameters:
            first, last = max(start, begin), min(stop, begin + p.numel())
            if first < last:
                at, columns = padding + first - start, math.prod(p.shape[1:])
                of = Fragment(
                    parameter=p, at=at, first=first - begin, values=last - first, columns=columns, rows=p.shape[0]
                )
                fragments.append(of)
            begin += p.numel()
        parts.append((flat, fragments))
    return parts


def place_of(of: Fragment, parameters: list[nn.Parameter]) -> int:
    """Index of a fragment's parameter."""
    return [id(p) for p in parameters].index(id(of.parameter))


def update_in_parts(
    parts: list[tuple[Tensor, list[Fragment]]],
    parameters: list[nn.Parameter],
    gradients: list[list[Tensor]],
    states: str,
) -> None:
    """Every part by an optimizer of its own, as a rank would; what no fragment holds gets a gradient too."""
    for flat, fragments in parts:
        optimizer = optimizer_of(list(parameters), states)
        optimizer.adopt(flat, fragments)
        optimizer.param_groups[0]["params"] = [flat]
        for step in gradients:
            flat.grad = torch.ones_like(flat)
            for of in fragments:
                of.within(flat.grad).copy_(of.within_whole(step[place_of(of, parameters)]))
            optimizer.step()


def joined(parts: list[tuple[Tensor, list[Fragment]]], parameters: list[nn.Parameter]) -> list[Tensor]:
    wholes = [torch.full(p.shape, torch.nan) for p in parameters]
    for flat, fragments in parts:
        for of in fragments:
            of.within_whole(wholes[place_of(of, parameters)]).copy_(of.within(flat))
    return wholes


def blocks_of(parameter: nn.Parameter, bounds: list[int]) -> list[tuple[int, int]]:
    """[start, stop) of the blocks of 8-bit states of a parameter that is cut at these indices; [] without any."""
    block = row_block(math.prod(parameter.shape[1:]))
    if not block:
        return []
    ends = sorted({*range(0, parameter.numel() + 1, block), *bounds})
    return list(pairwise(ends))


def nearest(values: Tensor, blocks: list[tuple[int, int]], *, signed: bool) -> Tensor:
    """float64 values after a stay in 8 bits, block by block, level by level."""
    levels, _ = level_tables(signed, torch.device("cpu"))
    kept = values.clone()
    for start, stop in blocks:
        part = values[start:stop]
        scale = part.abs().max()
        if scale > 0:
            unit = (part / scale).unsqueeze(1)
            kept[start:stop] = levels.double()[(unit - levels.double()).abs().argmin(1)] * scale
    return kept


def naive_adamw(parameter: nn.Parameter, gradients: list[Tensor], bounds: list[int]) -> Tensor:
    (beta1, beta2), eps, decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    blocks = blocks_of(parameter, bounds)
    weight = parameter.detach().double().reshape(-1)
    first, root = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, gradient in enumerate(gradients, 1):
        grad = gradient.double().reshape(-1)
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * root**2 + (1 - beta2) * grad**2
        corrected = (second / (1 - beta2**count)).sqrt() + eps
        weight = weight * (1 - RATE * decay) - RATE * first / (1 - beta1**count) / corrected
        first, root = nearest(first, blocks, signed=True), nearest(second.sqrt(), blocks, signed=False)
    return weight.reshape(parameter.shape)


@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, sum(math.prod(shape) for shape in SHAPES)), max_size=3, unique=True),
    padding=st.sampled_from([0, 3]),
    states=st.sampled_from(["int8", "int8", "float32"]),
    chunk=st.sampled_from([1, 96, 2**18]),
)
def test_cuts_change_nothing_but_the_blocks_that_they_cut(
    seed: int, cuts: list[int], padding: int, states: str, chunk: int
) -> None:
    parameters, gradients = parameters_of(seed), gradients_of(seed)
    parts = cut_flat(parameters, cuts, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragment, "CHUNK_VALUES", chunk)
        update_in_parts(parts, parameters, gradients, states)
    got = joined(parts, parameters)
    for flat, _ in parts:
        assert bool((flat[:padding] == 1.0).all()) and bool((flat[flat.numel() - padding :] == 1.0).all())

    begin = 0
    started = [p.detach().clone() for p in parameters]
    whole = optimizer_of(parameters, states)
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient
        whole.step()
    for i, p in enumerate(parameters):
        bounds = [cut - begin for cut in cuts if 0 < cut - begin < p.numel()]
        begin += p.numel()
        block = row_block(math.prod(p.shape[1:])) if states == "int8" else 0
        uncut = torch.ones(p.numel(), dtype=torch.bool)
        for bound in bounds if block else ():
            uncut[bound // block * block : -(-bound // block) * block] = False
        assert torch.equal(got[i].view(-1)[uncut], p.detach().view(-1)[uncut])
        if states == "int8":
            twin = naive_adamw(nn.Parameter(started[i]), [step[i] for step in gradients], bounds)
            error = (got[i].double() - twin).abs()  # float32 may round to a neighbouring level, once in a thousand
            assert float((error > 1e-6).double().mean()) < 0.02 and float(error.max()) < RATE / 10


@given(
    first=st.integers(0, 1000),
    values=st.integers(0, 1000),
    block=st.sampled_from([0, 32, 64, 256]),
)
def test_runs_are_the_whole_blocks_and_the_rest_at_either_end(first: int, values: int, block: int) -> None:
    runs = block_runs(first, values, block)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(values))
    ends = [0] if not block else [end - first for end in range(0, first + values + 1, block)]
    for run in runs:
        if run.block == block:
            assert not block or ((first + run.start) % block == 0 and (run.stop - run.start) % block == 0)
        else:
            assert run.block == run.stop - run.start < block
            assert not any(run.start < end < run.stop for end in ends)
    assert sum(run.block == block for run in runs) <= 1 and len(runs) <= 3


@pytest.mark.parametrize(("first", "values"), [(0, 192), (32, 64), (5, 100), (70, 20), (64, 0)])
@pytest.mark.parametrize("signed", [True, False])
def test_moments_of_a_fragment_survive_float32(first: int, values: int, signed: bool) -> None:
    """And one scale a block, whole or cut, is all that is kept beside the codes."""
    of = Fragment(parameter=torch.zeros(3, 64), first=first, values=values, columns=64, rows=3)
    moment = Moment(of, "int8", signed=signed, device=torch.device("cpu"))
    drawn = torch.randn(values, generator=torch.Generator().manual_seed(1)).pow(3)
    moment.write(drawn if signed else drawn.square())
    kept = [tensor.clone() for tensor in moment.tensors()]
    into = torch.zeros(values)
    moment.read(into)
    moment.write(into)
    assert all(torch.equal(a, b) for a, b in zip(kept, moment.tensors(), strict=True))
    codes, scales = kept
    touched = len({(first + i) // 64 for i in range(values)})
    assert codes.shape == (values,) and codes.dtype == torch.uint8 and scales.shape == (touched,)


def test_a_skipped_update_leaves_fragments_alone() -> None:
    parameters, gradients = parameters_of(0), gradients_of(0)
    ((flat, fragments),) = cut_flat(parameters, [], 2)
    optimizer = optimizer_of(list(parameters), "int8")
    optimizer.adopt(flat, fragments)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.cat([torch.zeros(2), *(g.reshape(-1) for g in gradients[0]), torch.zeros(2)])
    optimizer.step()

    def kept() -> list[Tensor]:
        states = [optimizer.state[p] for p in parameters]
        moments = [t for s in states for key in ("exp_avg", "exp_avg_sq") for t in s[key].tensors()]
        return [t.clone() for t in (flat, *moments, *(s["step"] for s in states))]

    before = kept()
    flat.grad[70] = torch.inf
    step_if_finite(optimizer, torch.tensor(torch.inf))
    assert all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))
