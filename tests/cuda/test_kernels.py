"""Packing, the layer, 8-bit moments and random rounding on CUDA, against the CPU and against float64.

bitsandbytes has a kernel of its own for each device. Where a value lies within float32's rounding of the midpoint
between two levels, they may choose different ones: of random values that is about one in a million, allowed is one in a
thousand.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig, LowRankPath, Side
from loqt_scale.functional.blockwise import decode, encode
from loqt_scale.functional.projection import test_matrix as omega_of
from loqt_scale.functional.projection import times_test_matrix
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from loqt_scale.functional.rounding import stochastic_bfloat16
from loqt_scale.layers import GradientProbe, LoQTLinear
from loqt_scale.model.packed_attention import why_not_by_blocks
from tests.unit.optim.test_one_kernel import KINDS, train

SCHEMES = ["nf4", "nf4_double", "fp4", "int8", "none"]
FLIPPED = 1e-3  # share of values that may fall to the other side of a midpoint


def random(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal, the same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def on(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


# 96 columns bind rows in groups of two, of which the last is padded
@pytest.mark.parametrize(("rows", "cols", "block"), [(129, 96, 64), (256, 512, 64), (64, 256, 32), (64, 4096, 4096)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_bytes_mean_the_same_on_both(
    device: torch.device, scheme: str, rows: int, cols: int, block: int
) -> None:
    layout = MatrixLayout(rows, cols, scheme, block)
    codes, scales = pack(random(rows, cols), layout)
    theirs = on(device, codes, scales)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-6)):
        expected, found = unpack(codes, scales, layout, dtype), unpack(*theirs, layout, dtype)
        assert found.device == device and found.shape == (rows, cols)
        torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_finds_the_same_levels(device: torch.device, scheme: str) -> None:
    layout = MatrixLayout(258, 96, scheme)
    weight = random(258, 96)
    weight[4:8] = 0.0  # blocks without a scale
    ours, theirs = pack(weight, layout), pack(weight.to(device), layout)
    assert [part.dtype for part in theirs if part is not None] == [part.dtype for part in ours if part is not None]
    expected, found = (unpack(*packed, layout, torch.float32).cpu() for packed in (ours, theirs))
    assert not found[4:8].any()
    close = torch.isclose(found, expected, rtol=1e-6, atol=1e-12)
    assert 1.0 - close.double().mean() <= FLIPPED, f"{(~close).sum()} of {close.numel()} values differ"
    assert relative(found, weight) == pytest.approx(relative(expected, weight), rel=1e-3, abs=1e-12)


def test_a_shard_is_packed_as_the_whole(device: torch.device) -> None:
    layout = MatrixLayout(258, 96, "nf4")
    weight = random(258, 96).to(device)
    whole = pack(weight, layout)
    for part, pieces in zip(whole, zip(pack(weight[:86], layout), pack(weight[86:], layout), strict=True), strict=True):
        assert part is not None and torch.equal(part, torch.cat([piece for piece in pieces if piece is not None]))


def make_layer(side: Side, compute: LowRankPath) -> LoQTLinear:
    """A layer on the CPU, 96 -> 80, with everything in it different from zero."""
    config = LoQTConfig(rank=8, side=side, compute=compute)
    layer = LoQTLinear(96, 80, bias=True, config=config)
    layer.base.store(random(80, 96) / 96**0.5)
    layer.projection.store(torch.linalg.qr(random(layer.spec.projection.rows, 8, seed=1))[0])
    assert layer.bias is not None
    with torch.no_grad():
        layer.factor.copy_(random(*layer.factor.shape, seed=2))
        layer.bias.copy_(random(80, seed=3))
    return layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("compute", ["fold", "branch"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("probe", ["none", "sketch", "dense"])
def test_layer_and_its_gradients_are_those_of_a_dense_float64_linear(
    device: torch.device,
    side: Side,
    compute: LowRankPath,
    dtype: torch.dtype,
    tolerance: float,
    probe: str,
) -> None:
    original = make_layer(side, compute)
    layer = copy.deepcopy(original).to(device)
    features, other = (96, 80) if side == "input" else (80, 96)
    omega = omega_of(other, seed=4, device=torch.device("cpu")) if probe == "sketch" else None
    if probe != "none":
        shape = (80, 96) if omega is None else (features, 20)
        layer.probe = GradientProbe.collecting(shape, None if omega is None else omega.to(device), device)
    x, upstream = random(33, 96, seed=5), random(33, 80, seed=6)
    ours = x.to(device, copy=True).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(ours)
    assert y.dtype == dtype
    y.backward(upstream.to(device, dtype))

    weight = original.effective_weight(torch.float64).requires_grad_()
    twin = x.double().requires_grad_()
    expected = nn.functional.linear(twin, weight, original.bias.double())
    expected.backward(upstream.double())
    assert weight.grad is not None
    basis = original.projection.dense(torch.float64)
    on_factor = original.spec.scale * (weight.grad @ basis if side == "input" else weight.grad.T @ basis)
    pairs = [(y, expected), (ours.grad, twin.grad), (layer.factor.grad, on_factor)]
    if layer.probe is not None:
        sketch = weight.grad
        if omega is not None:
            dense = times_test_matrix(torch.eye(other, dtype=torch.float64), omega, 20)  # Omega as a dense matrix
            sketch = (weight.grad.T if side == "input" else weight.grad) @ dense
        pairs.append((layer.probe.leaf.grad, sketch))
        assert layer.probe.leaf.grad.dtype == torch.float32
    for found, wanted in pairs:
        assert relative(found, wanted) < tolerance


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_moments(device: torch.device, signed: bool) -> None:
    values = random(40, 96) if signed else random(40, 96).square()
    ours, theirs = (encode(values.to(where), 32, signed=signed) for where in ("cpu", device))
    assert torch.equal(ours[1], theirs[1].cpu())
    assert (ours[0] != theirs[0].cpu()).double().mean() <= FLIPPED
    torch.testing.assert_close(decode(*theirs, signed=signed).cpu(), decode(*ours, signed=signed), rtol=0.1, atol=1e-6)


def test_random_rounding_is_a_function_of_seed_and_index(device: torch.device) -> None:
    values = random(7, 300)
    values[0, :2] = torch.tensor([float("nan"), float("inf")])
    ours, theirs = (stochastic_bfloat16(values.to(where), seed=2**63 - 5, first_index=9) for where in ("cpu", device))
    theirs = theirs.cpu()
    assert torch.equal(ours.isnan(), theirs.isnan())  # which of the NaNs is the device's own choice
    assert torch.equal(ours.nan_to_num(0.0).view(torch.int16), theirs.nan_to_num(0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_by_blocks_have_the_numbers_of_a_mask(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu":
        pytest.skip("FlexAttention has no backward pass on a CPU")
    for length in (256, 700):
        assert why_not_by_blocks(8, 2, 64, length, dtype, device) == ""


@pytest.mark.parametrize(("name", "dtype", "states"), KINDS)
def test_a_compiled_update_has_the_bits_of_its_operators(
    device: torch.device, name: str, dtype: torch.dtype, states: str
) -> None:
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager"):
        expected = train(name, dtype, states, compiled=True, device=device)
    found = train(name, dtype, states, compiled=True, device=device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
