"""Merges of fused experts against merges of the same experts one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, SubspaceConfig, convert_to_loqt
from loqt_scale.config import SideChoice
from loqt_scale.layers import loqt_layers
from loqt_scale.merge import MergeReport
from tests.unit.layers.expert_models import EXPERTS, HIDDEN, OneByOne, fused, routed

STEPS, GAP = 6, 2


class Source:
    """The weights before conversion, of the fused module and under the names of its oracle."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.weights:  # gate_up_proj.3.weight
            name, expert, _ = name.split(".")
            return self.weights[name][int(expert)][start:stop].clone()
        return self.weights[name][start:stop].clone()


def _config(side: SideChoice, method: Any, init: Any) -> LoQTConfig:
    merge = MergeConfig(gap=GAP, schedule="constant", last_step_fraction=1.0)
    return LoQTConfig(rank=8, side=side, init=init, subspace=SubspaceConfig(method=method), merge=merge)


def _train(model: nn.Module, config: LoQTConfig, source: Source) -> tuple[list[float], list[MergeReport]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = MergeCoordinator(model, optimizer, config, total_steps=20, seed=3, initial_weights=source)
    merges.begin()
    losses, reports = [], []
    for step in range(STEPS):
        hidden, index, weights = routed(step, experts=3 if step == 2 * GAP else EXPERTS)
        merges.prepare(step)
        loss = (model(hidden, index, weights) - hidden.sin()).square().mean()
        loss.backward()
        for parameter in model.parameters():  # what the fused experts see where no token comes
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        report = merges.finish(step)
        reports += [report] if report else []
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, reports


@pytest.mark.parametrize(
    ("kind", "side", "method", "init"),
    [
        ("mixtral", "auto", "sketch", "zero"),
        ("mixtral", "input", "randomized", "loftq"),
        ("gpt_oss", "input", "sketch", "loftq"),
        ("gpt_oss", "output", "svd", "zero"),
    ],
)
def test_merges_are_those_of_single_layers(kind: str, side: SideChoice, method: Any, init: Any) -> None:
    config = _config(side, method, init)
    module = fused(kind)
    source, oracle = Source(module), OneByOne(fused(kind), config)
    convert_to_loqt(module, config)
    losses, reports = _train(module, config, source)
    expected, single_reports = _train(oracle, config, source)
    exactly_seeded = method != "randomized" and init == "zero"  # else every layer has random numbers by its own name
    assert losses == pytest.approx(expected, rel=1e-5 if exactly_seeded else 0.05)
    assert losses[-1] < losses[0]
    assert reports[-1].kept == ("down_proj[3]", "gate_up_proj[3]") and not reports[0].kept
    assert set(single_reports[-1].kept) == {"down_proj.3", "gate_up_proj.3"}
    if not exactly_seeded:
        return
    for name, layer in loqt_layers(module):
        ones = getattr(oracle, name)
        torch.testing.assert_close(layer.effective_weight(), torch.stack([one.effective_weight() for one in ones]))
        for key, value in reports[-1].layers[name].items():
            singles = [single_reports[-1].layers[f"{name}.{expert}"][key] for expert in range(EXPERTS - 1)]
            near = 0.05 if key == "update_survival" else 1e-3  # there the mean is weighted by ||U||^2
            assert value == pytest.approx(sum(singles) / len(singles), rel=near)


def test_experts_that_never_had_a_token_get_a_random_basis() -> None:
    config = _config("auto", "sketch", "zero")
    module = fused("mixtral")
    convert_to_loqt(module, config)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    merges = MergeCoordinator(module, optimizer, config, total_steps=20)
    merges.prepare(0)
    module(*routed(0, experts=3)).square().sum().backward()
    optimizer.step()
    report = merges.finish(0)
    assert report is not None and not report.kept
    basis = module.gate_up_proj.projection.dense().view(EXPERTS, HIDDEN, -1)
    torch.testing.assert_close(basis[3].T @ basis[3], torch.eye(8), atol=0.2, rtol=0)


def test_torchs_muon_is_refused() -> None:
    """It would take the factors of all experts for one matrix."""
    config, model = _config("auto", "sketch", "zero"), fused("mixtral")
    convert_to_loqt(model, config)
    factors = [layer.factor for _, layer in loqt_layers(model)]
    with pytest.raises(ValueError, match=r"Muon holds the factor of gate_up_proj.*attach\(model, \[muon, adamw\]"):
        MergeCoordinator(model, torch.optim.Muon(factors), config)
