"""Muon's step from Gram matrices: against the iteration as it is written, in float64, however rows are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loqt_scale.config import OptimConfig
from loqt_scale.functional.orthogonal import (
    COEFFICIENTS,
    ITERATIONS,
    gram,
    orthogonalizer,
    pack_symmetric,
    unpack_symmetric,
    update_scale,
)
from loqt_scale.functional.transport import apply_state_policy
from loqt_scale.optim import Fragment, RowShards, StreamedMuon, create_optimizer, muon, open_moments, step_if_finite
from tests.unit.shards import Shards

RATE, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.9, 3
SHAPES = [(7, 4), (5, 4), (3, 4), (9, 8), (4, 6)]


def optimizer_of(tensors: list[Tensor], shards: RowShards | None = None, states: str = "float32") -> StreamedMuon:
    adam: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": DECAY}
    rows: dict[str, Any] = {"local": lambda tensor: tensor, "first_row": lambda _: 0, "seed": 3, "states": states}
    groups = [{"params": tensors, "lr": RATE, "muon": True}]
    return StreamedMuon(groups, momentum=MOMENTUM, shards=shards or RowShards(), **adam, **rows)


def draw(seed: int, shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def orthogonalize(matrix: Tensor) -> Tensor:
    """U Q of a whole matrix in its own dtype, by the iteration as its authors write it."""
    a, b, c = COEFFICIENTS
    found = matrix / matrix.norm().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(ITERATIONS):
        power = found.T @ found
        found = a * found + found @ (b * power + c * power @ power)
    return found


def naive(weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Muon as its authors write it, in float64."""
    found = []
    for index, weight in enumerate(weights):
        value, mean = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
        for grads in gradients:
            grad = grads[index].double()
            mean = MOMENTUM * mean + (1 - MOMENTUM) * grad
            step = orthogonalize(MOMENTUM * mean + (1 - MOMENTUM) * grad)
            value = (1 - RATE * DECAY) * value - RATE * update_scale(*weight.shape) * step
        found.append(value)
    return found


def test_gram_iteration_is_the_iteration() -> None:
    """In float64 to its last places, over singular values of four decades and where there are fewer than columns."""
    for matrix in (draw(0, [(96, 32)])[0] * torch.logspace(0, -4, 32), draw(1, [(8, 32)])[0], torch.zeros(5, 3)):
        step = matrix.double() @ orthogonalizer(gram(matrix))
        assert torch.allclose(step, orthogonalize(matrix.double()), atol=1e-7)
    values = torch.linalg.svdvals(draw(2, [(64, 16)])[0].double() @ orthogonalizer(gram(draw(2, [(64, 16)])[0])))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_it_is_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to torch's iteration in bfloat16."""
    ours, theirs = (nn.Parameter(draw(0, [(64, 16)])[0]) for _ in range(2))
    reference = torch.optim.Muon(
        [theirs], lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    optimizer, start = optimizer_of([ours]), ours.detach().clone()
    for step in range(5):
        ours.grad, theirs.grad = (draw(step + 1, [(64, 16)])[0] for _ in range(2))
        optimizer.step()
        reference.step()
    assert float((ours - theirs).detach().norm()) < 0.02 * float((ours - start).detach().norm())


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_whole_matrices_take_the_naive_step(shape: tuple[int, int]) -> None:
    """Tall, wide (by the smaller side's Gram matrix) and square; Gram matrices of a wave are iterated together."""
    weights = [nn.Parameter(t) for t in draw(0, [shape, shape])]
    gradients = [draw(seed, [shape, shape]) for seed in range(1, 1 + STEPS)]
    expected, optimizer = naive([w.detach() for w in weights], gradients), optimizer_of(list(weights))
    for grads in gradients:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        assert torch.allclose(weight.double(), value, atol=2e-6)


def cut(parameters: list[nn.Parameter], cuts: list[int]) -> list[tuple[Tensor, list[Fragment]]]:
    """The parameters one after the other, cut at these places, as ZeRO does."""
    whole = torch.cat([p.detach().reshape(-1) for p in parameters])
    parts = []
    for start, stop in pairwise([0, *sorted(cuts), whole.numel()]):
        fragments, begin = [], 0
        for p in parameters:
            first, last = max(start, begin), min(stop, begin + p.numel())
            place = {"at": first - start, "first": first - begin, "values": last - first} if first < last else {}
            place = place or {"first": 0, "values": 0}
            fragments.append(Fragment(parameter=p, columns=p.shape[1], rows=p.shape[0], **place))
            begin += p.numel()
        parts.append((whole[start:stop].clone(), fragments))
    return parts


VALUES = sum(rows * columns for rows, columns in SHAPES)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, VALUES), min_size=1, max_size=4), st.sampled_from([1, 2**23]))
def test_rows_may_be_cut_anywhere(cuts: list[int], wave: int) -> None:
    """Inside rows, several times in one, at their ends; ranks may hold nothing of a matrix, or nothing at all."""
    parameters = [nn.Parameter(t) for t in draw(0)]
    gradients = [draw(seed) for seed in range(1, 1 + STEPS)]
    parts, ranks = cut(parameters, cuts), len(cuts) + 1
    shards = Shards(ranks)

    def train(rank: int) -> None:
        flat, fragments = parts[rank]
        optimizer = optimizer_of(list(parameters), RowShards(shards.sum_for(rank), rank, ranks))
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.adopt(flat, fragments)
        bounds = [0, *sorted(cuts), VALUES]
        for grads in gradients:
            flat.grad = torch.cat([g.reshape(-1) for g in grads])[bounds[rank] : bounds[rank + 1]]
            optimizer.step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "WAVE_VALUES", wave)
        shards.run(train)
    expected = torch.cat([value.reshape(-1) for value in naive([p.detach() for p in parameters], gradients)])
    assert torch.allclose(torch.cat([flat for flat, _ in parts]).double(), expected, atol=2e-6)


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_a_step_that_is_not_finite_changes_no_bit(states: str) -> None:
    weight = nn.Parameter(draw(0, [(8, 32)])[0])
    optimizer = optimizer_of([weight], states=states)
    weight.grad = draw(1, [(8, 32)])[0]
    step_if_finite(optimizer, torch.tensor(1.0))
    before = [weight.detach().clone(), *(t.clone() for t in optimizer.state[weight]["exp_avg"].tensors())]
    weight.grad = torch.full_like(weight, float("nan"))
    step_if_finite(optimizer, torch.tensor(float("nan")))
    after = [weight.detach(), *optimizer.state[weight]["exp_avg"].tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert float(optimizer.state[weight]["step"]) == 1.0


def test_momentum_is_transported_exactly() -> None:
    """Old and new P span one space: the momentum of W is the same before and after."""
    old, turn = torch.linalg.qr(draw(0, [(16, 4)])[0])[0], torch.linalg.qr(draw(1, [(4, 4)])[0])[0]
    new = old @ turn
    weight = nn.Parameter(draw(2, [(8, 4)])[0])
    optimizer = optimizer_of([weight])
    weight.grad = draw(3, [(8, 4)])[0]
    optimizer.step()
    with open_moments(optimizer, weight, lambda tensor: tensor) as moments:
        assert moments is not None and len(moments) == 1
        before = moments[0] @ old.T
        apply_state_policy(moments[0], None, old.T @ new, "transport")
    with open_moments(optimizer, weight, lambda tensor: tensor, edit=False) as moments:
        assert moments is not None and torch.allclose(moments[0] @ new.T, before, atol=1e-6)


@given(st.integers(1, 3), st.integers(1, 6))
def test_triangles_hold_symmetric_matrices(count: int, size: int) -> None:
    matrices = torch.randn(count, size, size)
    matrices = matrices + matrices.mT
    triangles = pack_symmetric(matrices)
    assert triangles.shape == (count, size * (size + 1) // 2)
    assert torch.equal(unpack_symmetric(triangles, size), matrices)


def test_dense_weights_that_zero_3_has_emptied_are_not_taken_for_experts() -> None:
    """DeepSpeed leaves one dimension of a parameter, without values, before the optimizer is made."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    groups = create_optimizer(model, OptimConfig(name="muon"), ["0", "1"]).param_groups
    assert [(group["muon"], len(group["params"])) for group in groups] == [(True, 2), (False, 1)]
