"""Layers that are in no backward pass of a merge step: routed away, dropped, unused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, SubspaceConfig, convert_to_loqt
from loqt_scale.config import SubspaceMethod
from loqt_scale.layers import LoQTLinear

WIDTH = 32


class Routed(nn.Module):
    """Two experts; a step goes through those that are named. One of no rows gives gradients of zeros, not none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor, through: str) -> Tensor:
        return sum(self.experts[name.lower()](x[:0] if name.isupper() else x).sum(0) for name in through)  # type: ignore


def make(method: SubspaceMethod = "sketch") -> tuple[Routed, torch.optim.Optimizer, MergeCoordinator]:
    torch.manual_seed(0)
    model = Routed()
    config = LoQTConfig(
        rank=4,
        subspace=SubspaceConfig(method=method),
        merge=MergeConfig(gap=2, schedule="constant"),
        quantization=QuantizationConfig(block_size=32),
    )
    convert_to_loqt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, MergeCoordinator(model, optimizer, config, total_steps=20)


def step_with(
    model: Routed,
    optimizer: torch.optim.Optimizer,
    merges: MergeCoordinator,
    step: int,
    through: str,
    passes: int | None,
) -> object:
    merges.prepare(step, backward_passes=passes)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    (model(x, through) - x.sum(0)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return merges


@pytest.mark.parametrize(("through", "passes"), [("a", None), ("a", 1), ("aB", 1)])
@pytest.mark.parametrize("method", ["sketch", "svd"])
def test_a_layer_without_a_token_stays_as_it_is_and_the_others_merge(
    through: str, passes: int | None, method: SubspaceMethod
) -> None:
    model, optimizer, merges = make(method)
    for step in range(3):
        step_with(model, optimizer, merges, step, "ab" if step < 2 else through, passes)
        if step < 2:
            merges.finish(step)
    layer = model.experts["b"]
    assert isinstance(layer, LoQTLinear)
    before = copy.deepcopy((layer.state_dict(), optimizer.state[layer.factor]))
    first = model.experts["a"].state_dict()
    old = {name: value.clone() for name, value in first.items()}
    report = merges.finish(2)
    assert report is not None and report.kept == ("experts.b",)
    assert all(torch.equal(value, before[0][name]) for name, value in layer.state_dict().items())
    assert all(torch.equal(value, before[1][name]) for name, value in optimizer.state[layer.factor].items())
    assert not torch.equal(first["projection.codes"], old["projection.codes"])
    means = report.means()
    assert means["gradient_energy"] == report.layers["experts.a"]["gradient_energy"] >= 0.0
    step_with(model, optimizer, merges, 3, "ab", passes)
    merges.finish(3)
    step_with(model, optimizer, merges, 4, "ab", passes)
    later = merges.finish(4)
    assert later is not None and later.kept == ()
    assert not torch.equal(layer.state_dict()["projection.codes"], before[0]["projection.codes"])


def test_a_layer_without_a_token_in_its_first_merge_can_learn_all_the_same() -> None:
    model, optimizer, merges = make()
    step_with(model, optimizer, merges, 0, "a", None)
    report = merges.finish(0)
    layer = model.experts["b"]
    assert isinstance(layer, LoQTLinear) and report is not None and report.kept == ()
    basis = layer.projection.dense()
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=0.3, rtol=0)  # in 4 bits
    before = layer.factor.detach().clone()
    step_with(model, optimizer, merges, 1, "b", None)
    assert not torch.equal(layer.factor, before)


@pytest.mark.parametrize("passes", [None, 1])
def test_a_merge_step_without_any_backward_pass_is_a_mistake(passes: int | None) -> None:
    _, _, merges = make()
    merges.prepare(0, backward_passes=passes)
    with pytest.raises(RuntimeError, match=r"no LoQT layer was in a backward pass.*call prepare\(step\) before"):
        merges.finish(0)
