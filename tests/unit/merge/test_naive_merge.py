"""A merge beside the algorithm as printed, in float64, on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loqt_scale.functional.compensation import BEYOND, SETTLED
from loqt_scale.functional.projection import sign_direction
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from loqt_scale.layers import LoQTLinear, loqt_layers
from tests.unit.merge.small import RANK, SCALE, Dense, Small, config, loss_of, make, train


def round_trip(matrix: Tensor) -> Tensor:
    """Through NF4 and back, float64. The quantizer itself has its own oracle in test_quantization."""
    layout = MatrixLayout(*matrix.shape, "nf4")
    return unpack(*pack(matrix.float(), layout), layout, torch.float64)


def naive_merge(weight: Tensor, gradient: Tensor, side: str, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's merge of one dense merged weight, with over-relaxed rounds: (P, dequantized W, B), float64."""
    left, _, right = torch.linalg.svd(gradient.double())
    exact = right[:RANK].T if side == "input" else left[:, :RANK]
    direction = sign_direction(exact.shape[0], exact.device).double()
    basis = round_trip(exact * (direction.T @ exact).sign())  # the sign rule
    best: tuple[float, Tensor, Tensor] | None = None
    low_rank = before = torch.zeros_like(weight)
    plain = float((weight - round_trip(weight)).norm())
    gains: list[float] = []
    for _ in range(rounds):
        base = round_trip(weight - SCALE * (low_rank + BEYOND * (low_rank - before)))
        before = low_rank
        pinv = torch.linalg.pinv(basis)
        if side == "input":
            factor = (weight - base) @ pinv.T / SCALE
            low_rank = factor @ basis.T
        else:
            factor = ((pinv @ (weight - base)) / SCALE).T
            low_rank = basis @ factor.T
        error = float((weight - base - SCALE * low_rank).norm())
        gains.append(1 - error / (plain if best is None else best[0]))
        if best is None or error < best[0]:
            best = (error, base, factor)
        shrinks = gains[-1] / gains[-2] if len(gains) > 1 and gains[-2] > 0 else 1.0
        if gains[-1] <= 0 or gains[-1] * min(1.0, shrinks) < SETTLED:
            break
    assert best is not None
    return basis, best[1], best[2]


def dense_gradients(model: Small, step: int) -> dict[str, Tensor]:
    """Weight gradients of the LoQT layers' effective weights, by autograd on a dense twin of the model."""
    twin = Small()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            ours = model.get_submodule(name)
            dense = ours.effective_weight() if isinstance(ours, LoQTLinear) else ours.weight
            module.weight.data.copy_(dense)  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.copy_(ours.bias)  # type: ignore[arg-type]
    loss_of(twin, step).backward()
    gradients = {name: twin.get_submodule(name).weight.grad for name, _ in loqt_layers(model)}
    assert all(isinstance(g, Tensor) for g in gradients.values())
    return gradients  # type: ignore[return-value]


@pytest.mark.parametrize("first", [True, False])
def test_svd_merge_equals_the_naive_float64_algorithm(first: bool) -> None:
    """At step 0 the merged weight is the true initial one; later it is dequant(W_q) + s L(B), B after its own step."""
    model, merges, optimizer = make(config("svd"))
    step = 0 if first else 5
    torch.manual_seed(0)
    source = Dense(Small()) if first else None
    train(model, merges, optimizer, range(step))
    gradients = dense_gradients(model, step)
    merges.prepare(step)
    loss_of(model, step).backward()
    optimizer.step()
    merged = {
        name: (source.weights[f"{name}.weight"].double() if source else layer.effective_weight(torch.float64))
        for name, layer in loqt_layers(model)
    }
    report = merges.finish(step)
    assert report is not None
    for name, layer in loqt_layers(model):
        basis, base, factor = naive_merge(merged[name], gradients[name], layer.side, rounds=5)
        ours = layer.projection.dense(torch.float64)
        assert ((ours - basis).abs() > 1e-3).float().mean() < 0.02, name  # midpoints of codes may fall either way
        naive_effective = base + SCALE * (factor @ basis.T if layer.side == "input" else basis @ factor.T)
        error = (merged[name] - layer.effective_weight(torch.float64)).norm() / merged[name].norm()
        naive_error = (merged[name] - naive_effective).norm() / merged[name].norm()
        assert float(error) == pytest.approx(float(naive_error), rel=0.02), name
        assert report.layers[name]["error_after"] == pytest.approx(float(error), rel=1e-3)
        if first:
            moved = (layer.base.dense(torch.float64) - base).norm() / base.norm()
            assert moved < 0.03, name
            assert (layer.factor.double() - factor).norm() < 0.1 * factor.norm(), name


def test_randomized_keeps_the_exact_energy_even_of_flat_gradients() -> None:
    """These toy gradients are as flat as gradients get; tests/integration does it on a language model, sketches too."""
    for step in (0, 10):
        model, merges, optimizer = make(config("randomized"))
        train(model, merges, optimizer, range(step))
        gradients = dense_gradients(model, step)
        merges.prepare(step)
        loss_of(model, step).backward()
        optimizer.step()
        merges.finish(step)
        for name, layer in loqt_layers(model):
            gradient = gradients[name].double()
            basis = torch.linalg.qr(layer.projection.dense(torch.float64))[0]
            kept = (gradient @ basis if layer.side == "input" else basis.T @ gradient).square().sum()
            left, _, right = torch.linalg.svd(gradient)
            exact = round_trip(right[:RANK].T if layer.side == "input" else left[:, :RANK])
            exact = torch.linalg.qr(exact)[0]
            best = (gradient @ exact if layer.side == "input" else exact.T @ gradient).square().sum()
            assert kept >= 0.99 * best, (name, step, float(kept / best))
