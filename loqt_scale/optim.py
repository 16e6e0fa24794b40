"""AdamW over two groups of parameters, its schedule, and access to the moments that a merge must carry over.

Group `low_rank` holds the factors B (under `--method full`: the same layers' dense weights), group `full_precision`
everything else that trains: embeddings, norms, biases, head. They have learning rates of their own, because what
suits a factor (1e-2) ruins an embedding in plain Adam.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from loqt_scale.config import OptimConfig
from loqt_scale.layers import loqt_layers


def low_rank_parameters(model: nn.Module, dense_layers: Iterable[str] = ()) -> list[nn.Parameter]:
    """The factors of all LoQT layers, or the weights of `dense_layers` under `--method full`."""
    factors = [layer.factor for _, layer in loqt_layers(model)]
    return factors + [model.get_parameter(f"{name}.weight") for name in dense_layers]


def create_optimizer(model: nn.Module, config: OptimConfig, dense_layers: Iterable[str] = ()) -> torch.optim.AdamW:
    """AdamW over everything that trains.

    Args:
        model: The model, its parameters allocated and, where a strategy shards, sharded.
        config: Rates, betas, decay.
        dense_layers: Under `--method full`, names of the linears whose weights take `lr`.
    """
    low_rank = low_rank_parameters(model, dense_layers)
    taken = {id(parameter) for parameter in low_rank}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    full_precision_lr = config.lr if config.full_precision_lr is None else config.full_precision_lr
    groups = [
        {"params": low_rank, "lr": config.lr, "name": "low_rank"},
        {"params": rest, "lr": full_precision_lr, "name": "full_precision"},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up to 1, then a cosine down to `final_fraction`, reached at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def create_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """`learning_rate_factor` on every group."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(
            step, total_steps=total_steps, warmup_steps=config.warmup_steps, final_fraction=config.final_lr_fraction
        ),
    )


def adam_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
    """(first, second) moment of a parameter, sharded as it is; None before its first step, or without Adam's state."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg" not in state or "exp_avg_sq" not in state:
        return None
    return state["exp_avg"], state["exp_avg_sq"]
