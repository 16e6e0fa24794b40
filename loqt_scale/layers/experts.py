"""LoQTExperts: the matrices of a mixture's experts, which transformers keeps in one 3-D parameter.

Such a parameter (`gate_up_proj` (E, O, I); (E, I, O) in gpt_oss) becomes a child module of the same name. What calls it
is the experts' module, whose class is exchanged for a subclass with a forward of its own: transformers would hand its
parameters to one of several functions (`experts_implementation`), all of which read them. The subclass keeps the
activation, gate, biases and norm of the model; it is known by the marks that transformers' decorator
`use_experts_implementation` leaves on every such module (`has_gate`, `is_transposed`, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.functional.grouped import GroupedProduct, group_ends
from loqt_scale.functional.low_rank_experts import LowRankExperts, expert_bases, expert_matrices, expert_weights
from loqt_scale.layers.layer import LoQTLayer, layer_spec

MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class LoQTExperts(LoQTLayer):
    """y_s = x_s (dequant(W_q,e) + s L(B_e))^T for the expert e of each row s; see `functional.low_rank_experts`.

    Args:
        experts: E.
        in_features: I.
        out_features: O.
        config: Rank, scale, side and storage.
        rank: r; default: `config.rank`.
        device: Where parameters live; `meta` allocates nothing.
        dtype: Dtype of `factor`.
        transposed: Whether weights are stored (E, I, O).

    Raises:
        ValueError: The rank exceeds the smaller side.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        config: LoQTConfig,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        spec = layer_spec(in_features, out_features, config, rank, transposed=transposed, experts=experts)
        super().__init__(spec, device, dtype)
        self.experts, self.in_features, self.out_features = experts, in_features, out_features

    @classmethod
    def from_weight(
        cls, weight: nn.Parameter, config: LoQTConfig, *, rank: int | None = None, transposed: bool
    ) -> LoQTExperts:
        """Quantizes a parameter (E, O, I), or (E, I, O) if transposed. One on the meta device stays there."""
        experts, rows, cols = weight.shape
        in_features, out_features = (rows, cols) if transposed else (cols, rows)
        how: dict[str, Any] = {"config": config, "rank": rank, "device": weight.device, "dtype": weight.dtype}
        layer = cls(experts, in_features, out_features, transposed=transposed, **how)
        if weight.device.type != "meta":
            layer.base.store(weight.detach().reshape(experts * rows, cols))
        return layer

    def forward(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """Applies each row's expert.

        Args:
            x_SI: Rows sorted by expert, (S, I).
            ends_E: Where the rows of each expert end, int32 (E,).

        Returns:
            (S, O) in x's dtype, or in autocast's.
        """
        x_SI = self.as_computed(x_SI)
        probe, omega = (None, None) if self.probe is None else (self.probe.leaf, self.probe.omega)
        base, projection = self.base, self.projection
        packed = (base.codes, base.scales, projection.codes, projection.scales)
        if not torch.compiler.is_compiling():
            self.count_pass()
        y_SO: Tensor = LowRankExperts.apply(x_SI, ends_E, *packed, self.factor, probe, omega, self.spec)
        return y_SO

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff of all experts as the model has it, dense (E, O, I) or (E, I, O). Only where it is not sharded."""
        spec, base, projection = self.spec, self.base, self.projection
        weights = expert_matrices(base.codes, base.scales, spec, dtype)
        bases = expert_bases(projection.codes, projection.scales, spec, dtype)
        return expert_weights(weights, bases, self.factor.to(dtype).view(self.experts, -1, self.rank), spec)

    def weight_name(self, name: str) -> str:
        """The layer has the parameter's own name."""
        return name

    def weight_shape(self) -> tuple[int, ...]:
        """(E, O, I), or (E, I, O)."""
        each = self.spec.each.base
        return (self.experts, each.rows, each.cols)

    def extra_repr(self) -> str:
        sizes = f"{self.experts} experts, {self.in_features} -> {self.out_features}"
        return f"{sizes}, rank {self.rank}, side {self.side}, scale {self.spec.scale}"


# ---- the module around them ----------------------------------------------------------------------------------------


def matrix_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the 3-D parameters of a module of experts as transformers has them; () for any other module."""
    if isinstance(module, ExpertsForward) or not all(hasattr(module, mark) for mark in MARKS):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = [getattr(module, name, None) for name in names]
    return names if all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in found) else ()


def put_experts(module: nn.Module, name: str, config: LoQTConfig, rank: int) -> None:
    """Converts one of a module's 3-D parameters, in place."""
    weight = getattr(module, name)
    layer = LoQTExperts.from_weight(weight, config, rank=rank, transposed=bool(module.is_transposed))
    delattr(module, name)
    module.add_module(name, layer.train(module.training))
    if not isinstance(module, ExpertsForward):
        module.__class__ = _converted(type(module))


class ExpertsForward:
    """The forward of a converted module of experts; mixed into its class."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs each token through its experts.

        Args:
            hidden_states: (tokens, H).
            top_k_index: Expert of each token's choices, (tokens, k).
            top_k_weights: Their weights, (tokens, k).

        Returns:
            (tokens, H).
        """
        this: Any = self
        (tokens, choices), width = top_k_index.shape, hidden_states.shape[-1]
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        first = "gate_up_proj" if this.has_gate else "up_proj"
        ends = group_ends(ids, _experts_of(getattr(this, first)))
        rows = _product(this, first, hidden_states[order // choices], ids, ends)
        rows = this._apply_gate(rows) if this.has_gate else this.act_fn(rows)
        rows = _product(this, "down_proj", rows, ids, ends)
        if this.has_post_expert_norm:
            rows = this.post_expert_norm(rows)
        rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return rows[back].view(tokens, choices, width).sum(1).to(hidden_states.dtype)


def _experts_of(weight: Any) -> int:
    count: int = weight.experts if isinstance(weight, LoQTExperts) else weight.shape[0]
    return count


def _product(module: Any, name: str, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
    """One of the experts' two products; its weight may have stayed dense."""
    weight = getattr(module, name)
    if isinstance(weight, LoQTExperts):
        y = weight(rows, ends)
    else:
        y = GroupedProduct.apply(rows, weight if module.is_transposed else weight.mT, ends)
    return y + getattr(module, f"{name}_bias").to(y.dtype)[ids] if module.has_bias else y


_CONVERTED: dict[Any, type[nn.Module]] = {}


def _converted(kind: Any) -> type[nn.Module]:
    """A subclass with our forward, which can be copied and pickled; always the same one."""
    if kind in _CONVERTED:
        return _CONVERTED[kind]

    def reduce(self: nn.Module, protocol: int) -> tuple[Callable[..., object], tuple[type], dict[str, Any]]:
        return _empty, (kind,), self.__dict__

    members = {"__reduce_ex__": reduce, "__module__": __name__}
    _CONVERTED[kind] = type(f"LoQT{kind.__name__}", (ExpertsForward, kind), members)
    return _CONVERTED[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(_converted(kind))
    return made
