"""The optimizer over two groups of parameters.

Group `low_rank` holds the factors B (under `method: full`: the same layers' dense weights), group `full_precision`
everything else that trains: embeddings, norms, biases, head. They have learning rates of their own, because what
suits a factor (1e-2) ruins an embedding in plain Adam. With `optim.name: muon` the first takes Muon's step, the second
AdamW's, as is the convention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.config import OptimConfig
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.optim.muon import StreamedMuon
from loqt_scale.optim.row_shards import RowShards
from loqt_scale.optim.streamed import StreamedAdamW


def low_rank_parameters(model: nn.Module, dense_layers: Iterable[str] = ()) -> list[nn.Parameter]:
    """The factors of all LoQT layers, or the weights of `dense_layers` under `method: full`."""
    factors = [layer.factor for _, layer in loqt_layers(model)]
    return factors + [dense_weight_of(model, name) for name in dense_layers]


def dense_weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer that was left dense; of experts the name is the parameter's own."""
    own = _own_parameter(model, name)
    return model.get_parameter(f"{name}.weight") if own is None else own


def _own_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of this name, if it is not a module's."""
    parent, _, leaf = name.rpartition(".")
    own = getattr(model.get_submodule(parent), leaf)
    return own if isinstance(own, nn.Parameter) else None


def _refuse_experts(model: nn.Module, dense_layers: Iterable[str]) -> None:
    names = [name for name, layer in loqt_layers(model) if layer.spec.experts is not None]
    own = {name: _own_parameter(model, name) for name in dense_layers}  # a linear's is flat under ZeRO 3
    names += [name for name, parameter in own.items() if parameter is not None and parameter.dim() != 2]
    if names:
        raise UserError(
            f"optim.name is muon, but {names[0]} holds the matrices of several experts, which Muon would take for one; "
            "write optim.name: adamw, in a loop of your own torch.optim.AdamW"
        )


def create_optimizer(
    model: nn.Module,
    config: OptimConfig,
    dense_layers: Iterable[str] = (),
    *,
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    first_row: Callable[[Tensor], int] = lambda _: 0,
    seed: int = 0,
    streamed: bool = False,
    shards: RowShards | None = None,
) -> torch.optim.Optimizer:
    """Muon and AdamW (`StreamedMuon`), or AdamW alone: torch's fused one, or a `StreamedAdamW` that saves memory.

    Args:
        model: The model, its parameters allocated and, where a strategy shards, sharded.
        config: Which optimizer, rates, betas, decay, kind of states.
        dense_layers: Under `method: full`, names of the linears whose weights take `lr`.
        local: The stored rows of a parameter or gradient.
        first_row: Index of the first of them in the whole parameter.
        seed: Of what is rounded at random.
        streamed: Take a `StreamedAdamW` (see `RunConfig.streams_updates`).
        shards: The ranks that each store a part of every parameter; default: each stores everything.
    """
    low_rank = low_rank_parameters(model, dense_layers)
    taken = {id(parameter) for parameter in low_rank}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    full_precision_lr = config.lr if config.full_precision_lr is None else config.full_precision_lr
    groups: list[dict[str, Any]] = [
        {"params": low_rank, "lr": config.lr, "name": "low_rank"},
        {"params": rest, "lr": full_precision_lr, "name": "full_precision"},
    ]
    groups = [group for group in groups if group["params"]]
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    rows: dict[str, Any] = {"states": config.states, "local": local, "first_row": first_row, "seed": seed}
    rows["compiled"] = config.compile
    if config.name == "muon":
        _refuse_experts(model, dense_layers)
        for group in groups:
            group["muon"] = group["name"] == "low_rank"
        return StreamedMuon(groups, momentum=config.momentum, shards=shards or RowShards(), **adam, **rows)
    return StreamedAdamW(groups, **adam, **rows) if streamed else torch.optim.AdamW(groups, **adam, fused=True)


def momentum_only(model: nn.Module, config: OptimConfig, dense_layers: Iterable[str] = ()) -> frozenset[str]:
    """Names of the parameters that have one moment instead of two: what Muon updates."""
    taken = {id(p) for p in low_rank_parameters(model, dense_layers)} if config.name == "muon" else set()
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in taken)
