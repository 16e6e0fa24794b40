"""Layers of fused experts against the same experts one by one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from loqt_scale.config import LoQTConfig, LowRankCompute, SideChoice, SubspaceConfig
from loqt_scale.functional.grouped import GroupedProduct, group_ends, grouped_rows, grouped_sums
from loqt_scale.layers import LoQTExperts, convert_to_loqt, loqt_layers
from loqt_scale.layers.experts import matrix_names
from loqt_scale.merge import attach_probes
from tests.unit.layers.expert_models import EXPERTS, OneByOne, exact, fused, routed


def _pair(kind: str, config: LoQTConfig) -> tuple[nn.Module, OneByOne]:
    """A converted module and its oracle, float64, with equal P and B that are not zero."""
    module = fused(kind)
    oracle = OneByOne(module, config)
    convert_to_loqt(module, config)
    for name, layer in loqt_layers(module):
        rows, factor_rows = layer.spec.each.projection.rows, layer.factor.shape[0] // EXPERTS
        bases, factors = torch.randn(EXPERTS, rows, layer.rank) / 4, torch.randn(EXPERTS, factor_rows, layer.rank) / 4
        layer.projection.store(bases.flatten(0, 1))
        with torch.no_grad():
            layer.factor.copy_(factors.flatten(0, 1))
            for one, basis, factor in zip(getattr(oracle, name), bases, factors, strict=True):
                one.projection.store(basis)
                one.factor.copy_(factor)
    return module.double(), oracle.double()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("side", "compute"), [("auto", "fold"), ("input", "branch"), ("output", "branch")])
@pytest.mark.parametrize("method", ["sketch", "svd"])
def test_outputs_gradients_and_probes_are_those_of_single_layers(
    kind: str, side: SideChoice, compute: LowRankCompute, method: Any
) -> None:
    config = LoQTConfig(rank=8, scale=0.5, side=side, compute=compute, subspace=SubspaceConfig(method=method))
    module, oracle = _pair(kind, config)
    for model in (module, oracle):
        attach_probes(dict(loqt_layers(model)), config.subspace, seed=1, device=torch.device("cpu"))
    hidden, index, weights = (part.double() if part.is_floating_point() else part for part in routed(0, experts=3))
    got, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    y, y_expected = module(got, index, weights), oracle(expected, index, weights)
    torch.testing.assert_close(y, y_expected)
    (y**3).sum().backward()
    (y_expected**3).sum().backward()
    torch.testing.assert_close(got.grad, expected.grad)
    for name, layer in loqt_layers(module):
        assert layer.probe is not None and layer.probe.leaf.grad is not None and layer.factor.grad is not None
        for expert, one in enumerate(getattr(oracle, name)):
            mine, probed = layer.factor.grad.view(EXPERTS, -1, layer.rank)[expert], layer.probe.leaf.grad[expert]
            if expert == EXPERTS - 1:  # no token went there
                assert not mine.any() and not probed.any() and one.factor.grad is None
                continue
            torch.testing.assert_close(mine, one.factor.grad)
            torch.testing.assert_close(probed, one.probe.leaf.grad)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_converted_module_computes_as_before_and_can_be_copied(kind: str) -> None:
    module, inputs = fused(kind), routed(1)
    before = module(*inputs)
    report = convert_to_loqt(module, exact(LoQTConfig(rank=8)))
    assert list(report) == ["gate_up_proj", "down_proj"] and report.share > 0.97
    torch.testing.assert_close(module(*inputs), before)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs), module(*inputs)) and isinstance(again.down_proj, LoQTExperts)
    assert isinstance(module, type(fused(kind))) and matrix_names(module) == ()


def test_one_of_the_two_matrices_may_stay_dense() -> None:
    module, inputs = fused("mixtral"), routed(1)
    before = module(*inputs)
    before.square().sum().backward()
    dense = module.down_proj.grad
    report = convert_to_loqt(module, exact(LoQTConfig(rank=8, target_modules=("*.gate_up_proj", "gate_up_proj"))))
    assert {item.name: item.why for item in report.left} == {"down_proj": "not in loqt.target_modules"}
    module.down_proj.grad = None
    after = module(*inputs)
    after.square().sum().backward()
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(module.down_proj.grad, dense)


def test_experts_whose_rows_do_not_fill_blocks_are_left_and_named() -> None:
    module = fused("mixtral")
    with torch.no_grad():
        module.down_proj = nn.Parameter(module.down_proj[:, :, :45].contiguous())
    report = convert_to_loqt(module, LoQTConfig(rank=8))
    assert list(report) == ["gate_up_proj"]
    assert "no multiple of the 64 rows" in report.left[0].why


def test_experts_of_an_unknown_form_are_left_with_the_reason() -> None:
    class OwnExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 96, 32))

    model = nn.ModuleDict({"experts": OwnExperts(), "linear": nn.Linear(32, 32)})
    with pytest.warns(UserWarning, match="experts whose own forward reads their matrices"):
        report = convert_to_loqt(model, LoQTConfig(rank=8))
    assert list(report) == ["linear"] and report.left[0].name == "experts.gate_up_proj"


def test_grouped_products_of_every_dtype() -> None:
    ends = group_ends(torch.tensor([0] * 3 + [2] * 6), 4)
    assert ends.tolist() == [3, 3, 9, 9]
    for dtype, width in ((torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 5), (torch.float64, 6)):
        x, weight = torch.randn(9, width).to(dtype), torch.randn(4, width, width).to(dtype)
        parts = list(zip([0, 3, 3, 9], [3, 3, 9, 9], strict=True))
        rows = torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate(parts)])
        sums = torch.stack([x[a:b].T @ x[a:b] for a, b in parts])
        torch.testing.assert_close(grouped_rows(x, weight, ends), rows)
        torch.testing.assert_close(grouped_sums(x, x, ends), sums)
        turned = weight.mT.contiguous().mT  # columns lie side by side
        torch.testing.assert_close(grouped_rows(x, turned, ends), rows)
    x, weight = torch.randn(9, 6).double().requires_grad_(), torch.randn(4, 6, 5).double().requires_grad_()
    torch.autograd.gradcheck(lambda a, b: GroupedProduct.apply(a, b, ends), (x, weight))
