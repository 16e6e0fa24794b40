"""The layer: its gradients against autograd, both paths, its probes, and everything users wrap around a linear."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loqt_scale.config import LoQTConfig, LowRankCompute, LowRankPath, QuantizationConfig, Side
from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_linear import LowRankLinear, choose_path
from loqt_scale.functional.projection import test_matrix as omega_of
from loqt_scale.functional.projection import times_test_matrix
from loqt_scale.layers import GradientProbe, LoQTLinear, convert_to_loqt, loqt_layers

SIDES: list[Side] = ["input", "output"]


def make_layer(
    out_features: int = 40,
    in_features: int = 48,
    *,
    side: Side = "input",
    compute: LowRankCompute = "auto",
    rank: int = 4,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfig | None = None,
) -> LoQTLinear:
    config = LoQTConfig(rank=rank, side=side, compute=compute, quantization=quantization or QuantizationConfig())
    layer = LoQTLinear(in_features, out_features, bias=bias, config=config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    layer.base.store(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
    rows = layer.spec.projection.rows
    layer.projection.store(torch.linalg.qr(torch.randn(rows, rank, generator=generator))[0])
    with torch.no_grad():
        layer.factor.copy_(torch.randn(layer.factor.shape, generator=generator))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(out_features, generator=generator))
    return layer


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("compute", ["fold", "branch"])
@pytest.mark.parametrize("probe", ["none", "sketch", "dense"])
def test_gradcheck_in_float64(side: Side, compute: LowRankPath, probe: str) -> None:
    layer = make_layer(side=side, compute=compute, dtype=torch.float64)
    features = 40 if side == "input" else 48
    omega = omega_of(features, seed=0, device=torch.device("cpu")).double() if probe == "sketch" else None
    x = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    factor = layer.factor.detach().clone().requires_grad_()
    shape = {"none": None, "sketch": (48 if side == "input" else 40, 17), "dense": (40, 48)}[probe]
    leaf = None if shape is None else torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    base, projection = layer.base, layer.projection

    def function(x: Tensor, factor: Tensor) -> Tensor:
        packed = (base.codes, base.scales, projection.codes, projection.scales)
        result: Tensor = LowRankLinear.apply(x, *packed, factor, leaf, omega, layer.spec)
        return result

    assert torch.autograd.gradcheck(function, (x, factor))


@settings(max_examples=30, deadline=None)
@given(
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 70),
    leading=st.sampled_from([(3,), (2, 5), (1, 1), (2, 3, 4), ()]),
    side=st.sampled_from(SIDES),
    compute=st.sampled_from(["fold", "branch"]),
    data=st.data(),
)
def test_equals_a_dense_linear(
    out_features: int, in_features: int, leading: tuple[int, ...], side: Side, compute: LowRankPath, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    layer = make_layer(out_features, in_features, side=side, compute=compute, rank=rank, dtype=torch.float64)
    x = torch.randn(*leading, in_features, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weight = layer.effective_weight(torch.float64).requires_grad_()
    assert layer.bias is not None
    bias = layer.bias.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(twin, weight, bias)
    assert y.shape == (*leading, out_features)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert x.grad is not None and weight.grad is not None and layer.factor.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    basis = layer.projection.dense(torch.float64)
    on_factor = weight.grad @ basis if side == "input" else weight.grad.T @ basis
    torch.testing.assert_close(layer.factor.grad, layer.spec.scale * on_factor)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dense", [True, False])
def test_probe_collects_the_weight_gradient_over_micro_batches(side: Side, dense: bool) -> None:
    layer = make_layer(side=side, dtype=torch.float64)
    omega = None if dense else omega_of(40 if side == "input" else 48, seed=0, device=torch.device("cpu")).double()
    shape = (40, 48) if dense else (48 if side == "input" else 40, 17)
    layer.probe = GradientProbe.collecting(shape, omega, torch.device("cpu"))
    weight = layer.effective_weight(torch.float64).requires_grad_()
    for _ in range(3):
        x = torch.randn(2, 5, 48, dtype=torch.float64)
        assert torch.equal(layer(x), make_layer(side=side, dtype=torch.float64)(x)), (
            "a probe must not change the output"
        )
        layer(x).square().sum().backward()
        nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    gradient = weight.grad
    assert gradient is not None
    expected = gradient
    if omega is not None:  # Omega as a dense matrix
        dense_omega = times_test_matrix(torch.eye(len(omega), dtype=torch.float64), omega, 17)
        expected = (gradient.T if side == "input" else gradient) @ dense_omega
    collected = layer.probe.leaf.grad
    assert collected is not None
    torch.testing.assert_close(collected.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_input_side_saves_no_input_activation() -> None:
    """Fact behind the memory claim: of x only X P is kept, except while a probe is attached."""
    layer = make_layer(64, 64, rank=4, bias=False)
    x = torch.randn(100, 64, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (100, 64) not in saved and (100, 4) in saved
    assert (64, 64) not in saved, "codes are kept for backward, not a dense weight"


@pytest.mark.parametrize("side", SIDES)
def test_bf16_autocast_is_close_to_float32(side: Side) -> None:
    layer = make_layer(side=side)
    x = torch.randn(8, 48)
    reference = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert layer.factor.grad is not None and layer.factor.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_activation_checkpointing_gives_the_same_gradients(side: Side, reentrant: bool) -> None:
    layer = make_layer(side=side)
    layer.probe = GradientProbe.collecting((40, 48), None, torch.device("cpu"))
    x = torch.randn(4, 48, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [x.grad, layer.factor.grad, layer.probe.leaf.grad]
    x.grad = layer.factor.grad = layer.probe.leaf.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for before, after in zip(plain, [x.grad, layer.factor.grad, layer.probe.leaf.grad], strict=True):
        assert before is not None and after is not None
        torch.testing.assert_close(before, after)


def test_frozen_input_and_inference_mode() -> None:
    layer = make_layer()
    x = torch.randn(3, 48)
    layer(x).sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer(x))


def test_quantization_none_is_an_exact_linear() -> None:
    layer = make_layer(quantization=QuantizationConfig(weight="none", projection="none"))
    assert layer.base.scales is None and layer.base.codes.shape == (layer.out_features, 4 * 48)
    x = torch.randn(3, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.effective_weight(), layer.bias))


def test_auto_side_and_rank_limit() -> None:
    config = LoQTConfig(rank=8)
    assert LoQTLinear(64, 64, bias=False, config=config).side == "input"
    assert LoQTLinear(65, 64, bias=False, config=config).side == "output"
    with pytest.raises(ValueError, match=r"loqt\.rank is 8, but the layer is 4 x 64; write 4 or less"):
        LoQTLinear(64, 4, bias=False, config=config)


@given(tokens=st.integers(1, 10**5), out_features=st.integers(8, 5000), in_features=st.integers(8, 5000))
def test_auto_takes_the_cheaper_path(tokens: int, out_features: int, in_features: int) -> None:
    rank = 8
    for side in SIDES:
        config = LoQTConfig(rank=rank, side=side)
        layer = LoQTLinear(in_features, out_features, bias=False, config=config, device="meta")
        fold = 2 * out_features * in_features * rank
        narrow = {("input", False): out_features, ("output", True): in_features}
        for backward in (False, True):
            branch = 2 * tokens * rank * narrow.get((side, backward), out_features + in_features)
            expected = "fold" if fold <= branch else "branch"
            assert choose_path(layer.spec, tokens, backward=backward) == expected


@pytest.mark.parametrize("side", SIDES)
def test_compiles_without_graph_breaks(side: Side) -> None:
    torch._dynamo.reset()
    layer = make_layer(side=side)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 48, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [x.grad, layer.factor.grad]
    x.grad = layer.factor.grad = None
    compiled(x).square().sum().backward()
    for before, after in zip(plain, [x.grad, layer.factor.grad], strict=True):
        assert before is not None and after is not None
        torch.testing.assert_close(before, after)
    layer.probe = GradientProbe.collecting((40, 48), None, torch.device("cpu"))
    compiled(x).square().sum().backward()
    assert layer.probe.leaf.grad is not None and layer.probe.leaf.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_what_it_returns_may_be_changed_in_place_as_of_an_ordinary_linear(bias: bool) -> None:
    """A view would make hooks that FSDP2 puts on it miss the backward pass."""
    layer, x = make_layer(bias=bias), torch.randn(2, 3, 48)
    gradients = []
    for in_place in (True, False):
        layer.factor.grad = None
        y = layer(x)
        assert not y._is_view() and y.shape == (2, 3, 40)
        y = y.mul_(3.0) if in_place else y * 3.0
        y.square().sum().backward()
        assert layer.factor.grad is not None
        gradients.append(layer.factor.grad)
    torch.testing.assert_close(*gradients)


def test_ranks_follow_the_first_pattern_that_matches() -> None:
    model = nn.Sequential(OrderedDict(query=nn.Linear(32, 32), key=nn.Linear(32, 32), up=nn.Linear(32, 64)))
    convert_to_loqt(model, LoQTConfig(rank=8, rank_pattern={"q*": 4, "*e*": 2}))
    assert {name: layer.factor.shape[1] for name, layer in loqt_layers(model)} == {"query": 4, "key": 2, "up": 8}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"q*": 33}, "a rank of loqt.rank_pattern is 33, but query is 32 x 64; write 32"),
        ({"z": 4}, "no converted layer"),
        ({"*": 4, "q*": 99}, "no converted layer"),
    ],
)
def test_a_pattern_of_ranks_that_cannot_be_is_refused(pattern: dict[str, int], said: str) -> None:
    model = nn.Sequential(OrderedDict(query=nn.Linear(64, 32), up=nn.Linear(64, 64)))
    with pytest.raises(UserError, match=said):
        convert_to_loqt(model, LoQTConfig(rank=8, rank_pattern=pattern))
