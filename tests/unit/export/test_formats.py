"""A parameter in each form of an export: shapes that rows and blocks do not divide, both sides, experts, transposed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loqt_scale import LoQTConfig, QuantizationConfig
from loqt_scale.export.formats import Adapter, Dense, Nf4
from loqt_scale.export.parts import Part
from loqt_scale.functional.quantization import pack, unpack
from loqt_scale.layers.layer import layer_spec

SHAPES = {"rows": st.integers(3, 40), "cols": st.integers(1, 40).map(lambda half: 2 * half), "side": st.booleans()}
PLAIN = Part("lm_head.weight", torch.Size((3, 2)), None, {"value": "model.lm_head.weight"})


def quantized(
    rows: int, cols: int, side: bool, *, weight: str = "nf4", transposed: bool = False, experts: int | None = None
) -> tuple[Part, dict[str, Tensor]]:
    """A layer's weight as a checkpoint holds it, with random values."""
    config = LoQTConfig(
        rank=2,
        scale=0.5,
        side="input" if side else "output",
        quantization=QuantizationConfig(weight=weight, projection="none", block_size=32),  # type: ignore[arg-type]
    )
    spec = layer_spec(cols, rows, config, None, transposed=transposed, experts=experts)
    generator = torch.Generator().manual_seed(rows * 100 + cols)

    def random(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator)

    stored: dict[str, Tensor] = {"factor": random((rows if side else cols) * (experts or 1), 2)}
    for which, layout in (("base", spec.base), ("projection", spec.projection)):
        codes, scales = pack(random(layout.rows, layout.cols), layout)
        stored[f"{which}.codes"] = codes
        if scales is not None:
            stored[f"{which}.scales"] = scales
    shape = (spec.base.rows, spec.base.cols) if experts is None else (experts, rows, cols)
    return Part("block.linear.weight", torch.Size(shape), spec, {role: role for role in stored}), stored


def matrices(part: Part, stored: dict[str, Tensor]) -> Tensor:
    """W_q + s L(B), one matrix after the other, (E, rows, cols) float64."""
    spec = part.spec
    assert spec is not None
    count = spec.expert_count
    base, projection = (
        unpack(stored[f"{which}.codes"], stored.get(f"{which}.scales"), layout, torch.float64).chunk(count)
        for which, layout in (("base", spec.base), ("projection", spec.projection))
    )
    factors = stored["factor"].double().chunk(count)
    pairs = [(b, p) if spec.side == "input" else (p, b) for b, p in zip(factors, projection, strict=True)]
    return torch.stack([w + spec.scale * left @ right.T for w, (left, right) in zip(base, pairs, strict=True)])


def same_outline(form: Any, part: Part, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a form writes, which must be what it said: files are planned by it."""
    outline, written = form.outline(part), form.write(part, stored)
    assert {name: (t.shape, t.dtype) for name, t in outline.items()} == {
        name: (t.shape, t.dtype) for name, t in written.items()
    }
    assert all(tensor.is_meta for tensor in outline.values())
    result: dict[str, Tensor] = written
    return result


@given(transposed=st.booleans(), weight=st.sampled_from(["nf4", "nf4_double", "int8", "none"]), **SHAPES)
def test_a_dense_weight_is_the_sum(rows: int, cols: int, side: bool, transposed: bool, weight: str) -> None:
    part, stored = quantized(rows, cols, side, weight=weight, transposed=transposed)
    written = same_outline(Dense(torch.float32), part, stored)[part.name]
    torch.testing.assert_close(written.double(), matrices(part, stored)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [True, False])
def test_experts_are_written_as_the_model_holds_them(side: bool) -> None:
    part, stored = quantized(6, 10, side, experts=3, weight="int8")
    written = same_outline(Dense(torch.float32), part, stored)[part.name]
    assert written.shape == (3, 6, 10)
    torch.testing.assert_close(written.double(), matrices(part, stored), atol=1e-5, rtol=1e-5)


@given(weight=st.sampled_from(["nf4", "nf4_double"]), **SHAPES)
def test_base_and_adapter_add_up_to_the_weight(rows: int, cols: int, side: bool, weight: str) -> None:
    """As bitsandbytes reads the one and peft multiplies the other, though our last row group may be padded."""
    part, stored = quantized(rows, cols, side, weight=weight)
    written = same_outline(Nf4(torch.float32), part, stored)
    assert written[part.name].shape == (-(-rows * cols // 2), 1)
    packed = {key.removeprefix(f"{part.name}."): value for key, value in written.items() if key != part.name}
    state = QuantState.from_dict(packed, torch.device("cpu"))
    assert state.shape == part.shape
    state.shape = torch.Size((1, rows * cols))  # its CPU kernel takes blocks for a row's own (`refuse_misread`)
    base = dequantize_4bit(written[part.name], state).view(part.shape)
    pair = same_outline(Adapter(torch.float32), part, stored)
    names = [f"base_model.model.block.linear.lora_{letter}.weight" for letter in "BA"]
    assert pair.keys() == set(names)
    total = base + pair[names[0]] @ pair[names[1]]
    torch.testing.assert_close(total.double(), matrices(part, stored)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "count"), [(Dense, 1), (Nf4, 1), (Adapter, 0)])
def test_what_was_not_quantized_is_cast_and_no_adapters_affair(form: Any, count: int) -> None:
    value = torch.arange(6.0).reshape(3, 2)
    written = same_outline(form(torch.bfloat16), PLAIN, {"value": value})
    assert len(written) == count and all(torch.equal(t, value.bfloat16()) for t in written.values())
