"""A parameter of the original model as the tensors of an exported file.

    dense     W_eff = dequant(W_q) + s L(B), one tensor
    nf4       W_q as bitsandbytes' Linear4bit stores it, byte for byte what was trained over; the rest dense
    adapter   s L(B) as a LoRA pair (PEFT): y += (x A^T) B^T with
                  side input    L = B P^T    A = P^T    B = s B
                  side output   L = P B^T    A = B^T    B = s P

A format first says what it will write (`outline`, on the meta device), so that files can be planned, then writes it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import Tensor

from loqt_scale.export.parts import Part, dense_matrix
from loqt_scale.functional.low_rank_experts import expert_weights
from loqt_scale.functional.low_rank_linear import effective_weight
from loqt_scale.functional.schemes import FourBit

Tensors = dict[str, Tensor]


class Format(Protocol):
    """How parameters are written."""

    def outline(self, part: Part) -> Tensors:
        """Names, shapes and dtypes of what `write` returns, on the meta device."""

    def write(self, part: Part, tensors: Tensors) -> Tensors:
        """The tensors to write.

        Args:
            part: The parameter.
            tensors: What the checkpoint holds of it, by role.
        """


class Dense:
    """Everything dense.

    Args:
        dtype: Of the written tensors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def outline(self, part: Part) -> Tensors:
        return {part.name: torch.empty(part.shape, dtype=self._dtype, device="meta")}

    def write(self, part: Part, tensors: Tensors) -> Tensors:
        if part.spec is None:
            return {part.name: tensors["value"].to(self._dtype)}
        base = dense_matrix(tensors, "base", part.spec.base)
        projection = dense_matrix(tensors, "projection", part.spec.projection)
        return {part.name: _merged(base, projection, tensors["factor"], part).to(self._dtype)}


def _merged(base: Tensor, projection: Tensor, factor: Tensor, part: Part) -> Tensor:
    """W_eff in the shape of the model's parameter, float32."""
    spec = part.spec
    assert spec is not None
    if spec.experts is None:
        return effective_weight(base, projection, factor, spec)
    bases, factors = (matrix.view(spec.experts, -1, matrix.shape[1]) for matrix in (projection, factor))
    return expert_weights(base.view(part.shape), bases, factors, spec)


class Nf4:
    """LoQT layers' bases as bitsandbytes stores 4-bit weights, everything else dense.

    Args:
        dtype: Of what is dense, and of what a 4-bit layer computes with.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._dense = dtype, Dense(dtype)

    def outline(self, part: Part) -> Tensors:
        if part.spec is None:
            return self._dense.outline(part)
        layout = part.spec.base
        codes = torch.empty(layout.codes_shape, dtype=torch.uint8, device="meta")
        scales = torch.empty(layout.scales_shape or (), dtype=torch.uint8, device="meta")
        return {name: tensor.to("meta") for name, tensor in self._packed(part, codes, scales).items()}

    def write(self, part: Part, tensors: Tensors) -> Tensors:
        if part.spec is None:
            return self._dense.write(part, tensors)
        return self._packed(part, tensors["base.codes"], tensors["base.scales"])

    def _packed(self, part: Part, codes: Tensor, scales: Tensor) -> Tensors:
        assert part.spec is not None
        layout, values = part.spec.base, part.shape.numel()
        block, kind = layout.block_size, layout.kind
        assert isinstance(kind, FourBit)
        # bitsandbytes knows no padding: what our last row group has beyond the matrix is cut off
        state = QuantState(
            absmax=kind.scale_values(scales).reshape(-1)[: -(-values // block)].clone(),
            shape=part.shape,
            code=get_4bit_type(kind.book, device="cpu"),
            blocksize=block,
            quant_type=kind.book,
            dtype=self._dtype,
        )
        weight = codes.reshape(-1)[: -(-values // 2)].reshape(-1, 1).clone()
        return {part.name: weight, **{f"{part.name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


class Adapter:
    """The low-rank products as LoRA pairs; nothing else.

    Args:
        dtype: Of the pairs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def outline(self, part: Part) -> Tensors:
        if part.spec is None:
            return {}
        rank = part.spec.projection.cols
        shapes = {"lora_A": (rank, part.shape[1]), "lora_B": (part.shape[0], rank)}
        return {_lora(part, key): torch.empty(size, dtype=self._dtype, device="meta") for key, size in shapes.items()}

    def write(self, part: Part, tensors: Tensors) -> Tensors:
        if part.spec is None:
            return {}
        projection, factor = dense_matrix(tensors, "projection", part.spec.projection), tensors["factor"]
        down, up = (projection, factor) if part.spec.side == "input" else (factor, projection)
        pair = {"lora_A": down.T, "lora_B": part.spec.scale * up}
        return {_lora(part, key): value.to(self._dtype).contiguous() for key, value in pair.items()}


def _lora(part: Part, key: str) -> str:
    return f"base_model.model.{part.layer}.{key}.weight"
