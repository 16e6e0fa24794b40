"""`LoQTLinear.weight` for code that reads it, and layers whose weight is stored transposed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, SubspaceConfig, convert_to_loqt
from loqt_scale.config import SideChoice, SubspaceMethod
from loqt_scale.errors import UserError
from loqt_scale.layers import LoQTLinear
from loqt_scale.merge import attach_probes

EXACT = QuantizationConfig(weight="none", projection="none")


def layer_of(linear: nn.Module, config: LoQTConfig) -> LoQTLinear:
    layer = LoQTLinear.from_linear(linear, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.projection.store(torch.randn(layer.spec.projection.rows, layer.rank, generator=generator))
        layer.factor.copy_(torch.randn(layer.factor.shape, generator=generator))
    return layer


@pytest.mark.parametrize("method", ["sketch", "svd"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("transposed", [False, True])
def test_whoever_reads_the_weight_trains_as_whoever_calls_the_layer(
    side: SideChoice, transposed: bool, method: SubspaceMethod
) -> None:
    config = LoQTConfig(rank=4, side=side, subspace=SubspaceConfig(method=method), quantization=EXACT)
    linear = Conv1D(40, 32) if transposed else nn.Linear(32, 40)
    layer = layer_of(linear.double(), config)
    x = torch.randn(6, 32, dtype=torch.float64)
    results = []
    for reads in (False, True):
        attach_probes({"": layer}, config.subspace, seed=0, device=x.device)
        own = x.clone().requires_grad_()
        y = (own @ layer.weight if transposed else F.linear(own, layer.weight)) + layer.bias if reads else layer(own)
        y.square().sum().backward()
        assert layer.probe is not None and layer.factor.grad is not None
        results.append((y.detach(), own.grad, layer.factor.grad, layer.probe.leaf.grad))
        layer.factor.grad, layer.probe = None, None
    for called, read in zip(*results, strict=True):
        torch.testing.assert_close(read, called)


def test_facts_of_a_weight_cost_nothing_and_its_values_are_the_layers() -> None:
    layer = layer_of(nn.Linear(32, 40), LoQTConfig(rank=4))
    names = set(layer.state_dict())
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad) == (
        (40, 32),
        torch.float32,
        "cpu",
        True,
    )
    with torch.no_grad():
        assert not layer.weight.requires_grad and torch.equal(weight + 0, layer.effective_weight())
    assert "weight" not in {*names, *dict(layer.named_parameters())}
    assert torch.equal(weight.data + 0, layer.effective_weight()) and not weight.detach().requires_grad
    compiled = torch.compile(lambda x: F.linear(x, layer.weight).to(layer.weight.dtype), backend="eager")
    x = torch.randn(3, 32)
    torch.testing.assert_close(compiled(x), layer(x) - layer.bias)


@pytest.mark.parametrize("write", ["normal_", "data", "init", "item", "freeze", "assign"])
def test_a_weight_that_is_computed_cannot_be_written(write: str) -> None:
    layer = layer_of(nn.Linear(32, 40), LoQTConfig(rank=4))
    weight = layer.weight
    with pytest.raises((UserError, AttributeError), match=r"cannot be written|no setter"):
        if write == "normal_":
            weight.normal_()
        elif write == "data":
            weight.data.copy_(torch.zeros(40, 32))
        elif write == "init":
            nn.init.normal_(weight)
        elif write == "item":
            weight[0] = 1.0
        elif write == "freeze":
            weight.requires_grad = False
        else:
            layer.weight = torch.zeros(40, 32)  # type: ignore[misc]


def test_torchs_own_encoder_computes_the_same_in_training_and_in_evaluation() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
    x, padded = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    report = convert_to_loqt(encoder, LoQTConfig(rank=4))
    expected = encoder(x, src_key_padding_mask=padded)
    with torch.no_grad():
        got = encoder.eval()(x, src_key_padding_mask=padded)
    torch.testing.assert_close(got[~padded], expected[~padded])
    assert len(report) == 4 and "MultiheadAttention" in str(report)


def _trained(model: nn.Module, config: LoQTConfig) -> list[Tensor]:
    convert_to_loqt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = MergeCoordinator(model, optimizer, config, total_steps=8)
    for step in range(8):
        merges.prepare(step)
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        merges.finish(step)
    return [layer.effective_weight() for layer in model if isinstance(layer, LoQTLinear)]


@pytest.mark.parametrize("method", ["sketch", "svd"])
@pytest.mark.parametrize("side", ["auto", "output"])
def test_gpt2s_conv1d_trains_and_merges_as_the_linear_layer_that_it_is(
    method: SubspaceMethod, side: SideChoice
) -> None:
    torch.manual_seed(0)
    turned = nn.Sequential(Conv1D(40, 24), nn.Tanh(), Conv1D(24, 40))
    plain = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    for conv, linear in ((turned[0], plain[0]), (turned[2], plain[2])):
        with torch.no_grad():
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
    start = copy.deepcopy(turned[0].weight.detach())
    config = LoQTConfig(
        rank=4,
        side=side,
        subspace=SubspaceConfig(method=method),
        merge=MergeConfig(gap=3, schedule="constant"),
        quantization=EXACT,
    )
    ours, oracle = _trained(turned, config), _trained(plain, config)
    assert ours[0].shape == (24, 40) and (ours[0] - start).abs().max() > 1e-2
    for conv, linear in zip(ours, oracle, strict=True):
        torch.testing.assert_close(conv.T, linear, rtol=1e-4, atol=1e-5)
