"""Packing: against a naive NF4, and whatever way the rows are cut."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.config import QuantScheme
from loqt_scale.functional.nf4_cpu import quantize_nf4
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from loqt_scale.functional.schemes import SCHEMES, pack_scales, unpack_scales

# the NF4 code book, QLoRA appendix E
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float64,
)


# bitsandbytes' 4-bit floats: sign, 2 exponent bits, 1 mantissa bit, over their greatest value 12
FP4 = torch.tensor([sign * v / 12.0 for v in (0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0) for sign in (1, -1)]).double()


def naive_round_trip(dense: torch.Tensor, block: int, scheme: str) -> torch.Tensor:
    """Nearest level of each block, one value at a time in spirit: float64, no packing, float32 scales."""
    flat = dense.double().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    scale = padded.abs().amax(1, keepdim=True)
    unit = padded / scale.clamp_min(1e-300)
    levels = {"fp4": FP4, "int8": torch.arange(-127, 128).double() / 127}.get(scheme, NF4)
    code = (unit[..., None] - levels).abs().argmin(-1)
    return (levels[code] * scale).reshape(-1)[: len(flat)].reshape(dense.shape)


def test_the_registry_has_what_the_settings_name() -> None:
    assert tuple(SCHEMES) == get_args(QuantScheme)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 64), (512, 1376), (7, 96), (130, 127), (3, 1)])
def test_round_trip_is_nearest_code(rows: int, cols: int, scheme: str) -> None:
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    layout = MatrixLayout(rows, cols, scheme)
    codes, scales = pack(dense, layout)
    assert codes.shape == layout.codes_shape and codes.dtype == torch.uint8
    assert scales is not None and scales.shape == layout.scales_shape and scales.dtype == torch.uint8
    expected = naive_round_trip(dense, 64, scheme)
    got = unpack(codes, scales, layout, torch.float64)
    # a value on the midpoint of two codes may fall either way in float32
    close = torch.isclose(got, expected, atol=1e-6)
    assert (~close).float().mean() < 1e-4
    assert got.shape == dense.shape


@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 5), count=st.integers(1, 200), spread=st.floats(0.0, 3.0))
def test_packed_scales_are_within_half_a_step(seed: int, groups: int, count: int, spread: float) -> None:
    """Each group by itself: within half of 1/255 of its own range, in as many bytes as scales and eight more."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(spread * torch.randn(groups, count, generator=generator)) * 1e-3
    packed = pack_scales(scales)
    assert packed.shape == (groups, 8 + count) and packed.dtype == torch.uint8
    step = (scales.amax(1, keepdim=True) - scales.amin(1, keepdim=True)) / 255
    assert bool(((unpack_scales(packed) - scales).abs() <= 0.51 * step + 1e-6 * scales.amax()).all())
    assert torch.equal(pack_scales(scales[:1]), packed[:1])


def test_double_quantization_costs_little_error_and_saves_most_of_the_scales() -> None:
    dense = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2)) * 0.02
    plain, double = (MatrixLayout(64, 4096, name) for name in ("nf4", "nf4_double"))
    assert plain.scales_shape is not None and double.scales_shape is not None
    bits = [8 * layout.scales_shape[1] / layout.group_values for layout in (plain, double) if layout.scales_shape]
    assert bits == [0.5, pytest.approx(0.141, abs=1e-3)]
    errors = [float((unpack(*pack(dense, x), x, torch.float32) - dense).norm() / dense.norm()) for x in (plain, double)]
    assert errors[1] < 1.001 * errors[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 80),
    ranks=st.integers(1, 5),
    block=st.sampled_from([32, 64]),
    scheme=st.sampled_from(sorted(SCHEMES.keys() - {"none"})),
)
def test_any_cut_into_groups_packs_the_same_bits(rows: int, cols: int, ranks: int, block: int, scheme: str) -> None:
    layout = MatrixLayout(rows, cols, scheme, block)
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 100 + cols))
    codes, scales = pack(dense, layout)
    assert scales is not None
    chunk = -(-layout.groups // ranks)
    parts = []
    for rank in range(ranks):
        groups = min(rank * chunk, layout.groups), min((rank + 1) * chunk, layout.groups)
        first, last = layout.rows_of_groups(*groups)
        piece = pack(dense[first:last], layout)
        assert piece[0].shape[0] == groups[1] - groups[0]
        assert torch.equal(
            unpack(*piece, layout, torch.float32, rows=last - first),
            unpack(codes, scales, layout, torch.float32)[first:last],
        )
        parts.append(piece)
    assert torch.equal(torch.cat([p[0] for p in parts]), codes)
    assert torch.equal(torch.cat([p[1] for p in parts if p[1] is not None]), scales)


@given(cols=st.integers(1, 3000), block=st.sampled_from([32, 64, 128]))
def test_groups_are_the_fewest_whole_rows(cols: int, block: int) -> None:
    group = MatrixLayout(10, cols, "nf4", block).group_rows
    assert group * cols % block == 0
    assert group * cols == math.lcm(cols, block)


def test_scheme_none_keeps_every_bit_and_copies() -> None:
    dense = torch.randn(5, 7)
    layout = MatrixLayout(5, 7, "none")
    codes, scales = pack(dense, layout)
    assert (
        scales is None
        and codes.dtype == torch.uint8
        and torch.equal(codes.view(torch.float32), dense)
        and codes.data_ptr() != dense.data_ptr()
    )
    again = unpack(codes, None, layout, torch.float32)
    assert again.data_ptr() != codes.data_ptr()
    assert torch.equal(again, dense)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cols", [64, 4, 96])
def test_every_second_group_unpacks_to_its_rows(cols: int, scheme: str) -> None:
    """Of 64 columns a group has one scale, so that scales of every second group do not lie side by side."""
    layout = MatrixLayout(96, cols, scheme)
    codes, scales = pack(torch.randn(96, cols, generator=torch.Generator().manual_seed(cols)), layout)
    whole = unpack(codes, scales, layout, torch.float32).view(-1, layout.group_rows, cols)
    rows = -(-layout.groups // 2) * layout.group_rows
    picked = unpack(codes[::2], None if scales is None else scales[::2], layout, torch.float32, rows=rows)
    assert torch.equal(picked.view(-1, layout.group_rows, cols), whole[::2])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_rows_and_zero_values(scheme: str) -> None:
    layout = MatrixLayout(4, 64, scheme)
    codes, scales = pack(torch.zeros(4, 64), layout)
    assert torch.equal(unpack(codes, scales, layout, torch.float32), torch.zeros(4, 64))
    assert unpack(*pack(torch.zeros(0, 64), layout), layout, torch.float32, rows=0).shape == (0, 64)


def bitsandbytes_codes(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(values, block, "nf4", torch.uint8)
    return codes.reshape(-1), scales


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([32, 64, 128, 4096]),
    st.sampled_from([1e-30, 1e-4, 1.0, 1e6]),
)
def test_table_codes_are_bitsandbytes_codes(seed: int, blocks: int, block: int, size: float) -> None:
    """Also with blocks of zeros, of one value, and of values too small for a division."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(blocks, block, generator=generator) * size
    values[torch.rand(blocks, generator=generator) < 0.2] = 0.0
    values[torch.rand(blocks, generator=generator) < 0.1] = -size
    values[torch.rand(blocks, generator=generator) < 0.1] *= 1e-15
    packed = quantize_nf4(values, block)
    assert packed is not None
    for ours, theirs in zip(packed, bitsandbytes_codes(values, block), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e5])
def test_table_codes_at_every_midpoint_and_cell_edge(scale: float) -> None:
    """A border, and the 64 floats on either side of it."""
    levels = get_4bit_type("nf4", device="cpu").sort().values
    borders = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.arange(-64, 65) / 64])
    near = [borders]
    for direction in (-2.0, 2.0):
        step = borders
        for _ in range(64):
            step = torch.nextafter(step, torch.full_like(step, direction))
            near.append(step.clamp(-1, 1))
    values = torch.cat(near)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 63)).reshape(-1, 63)
    blocks = torch.nn.functional.pad(blocks, (1, 0), value=1.0) * scale  # each block's greatest is `scale`
    packed = quantize_nf4(blocks, 64)
    assert packed is not None
    assert all(torch.equal(a, b) for a, b in zip(packed, bitsandbytes_codes(blocks, 64), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_go_to_bitsandbytes(bad: float) -> None:
    values = torch.randn(64, 64)
    values[3, 5] = bad
    assert quantize_nf4(values, 64) is None
    layout = MatrixLayout(64, 64, "nf4", 64)
    codes, scales = pack(values, layout)
    assert torch.equal(codes.reshape(-1), bitsandbytes_codes(values, 64)[0]) and scales is not None
