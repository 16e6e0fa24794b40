"""Where a DeepSpeed engine keeps what trains: its flat float32 tensors, and which values of which parameter they hold.

    stages 1, 2   a group's parameters one after the other, cut into N equal parts: a rank's part begins and ends
                  anywhere, and may hold nothing of a parameter
    stage 3       a rank's part of each parameter, one after the other: a parameter is cut into N parts of one size, of
                  which the last is padded

DeepSpeed hands out states as float32 tensors only, and tells nobody where its values lie. So this is the place for
the names that are its own affair (those of 0.19); everything else goes by its public calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.optim import Fragment


def masters(engine: Any, stage: int) -> list[Tensor]:
    """This rank's flat float32 tensors, (V,) each, which the optimizer updates."""
    zero = engine.optimizer
    flats: list[Tensor] = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    return flats


def held_parameters(engine: Any, stage: int) -> list[Tensor]:
    """The parameters that the engine's optimizer updates, on all ranks together. Local."""
    groups = engine.optimizer.fp16_groups if stage == 3 else engine.optimizer.bit16_groups
    return [parameter for group in groups for parameter in group]


def master_fragments(engine: Any, stage: int, rank: int) -> list[tuple[Tensor, list[Fragment]]]:
    """What each of this rank's flat tensors holds of each parameter, if only nothing; padding is in no fragment. Local.

    Args:
        engine: After `deepspeed.initialize`.
        stage: 1, 2 or 3.
        rank: This one.
    """
    zero = engine.optimizer
    groups, find = (zero.fp16_groups, _in_stage_3) if stage == 3 else (zero.bit16_groups, _in_stages_1_and_2)
    found = [[find(zero, parameter, rank) for parameter in group] for group in groups]
    return list(zip(masters(engine, stage), found, strict=True))


def _in_stages_1_and_2(zero: Any, parameter: Any, rank: int) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:  # other ranks hold all of it
        return _fragment(parameter, parameter.shape)
    flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _fragment(parameter, parameter.shape, at=flat.start, first=own.start, values=own.numel)


def _in_stage_3(zero: Any, parameter: Any, rank: int) -> Fragment:
    _, at, _ = zero.grad_position[zero.get_param_id(parameter)]
    return replace(stored_fragment(parameter, rank), at=at)


def stored_fragment(parameter: Any, rank: int) -> Fragment:
    """What a rank keeps of a parameter under stage 3, in `ds_tensor`; no values, at its end, if all is padding."""
    size = parameter.ds_tensor.numel()
    first = min(rank * size, parameter.ds_numel)
    values = min(size, parameter.ds_numel - first)
    return _fragment(parameter, parameter.ds_shape, first=first, values=values)


def init_of_zeros(deepspeed: Any) -> Any:
    """`deepspeed.zero.Init` for parameters that are zero on all ranks, which it would broadcast before it cuts them."""

    def cut(self: Any, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return type("InitOfZeros", (deepspeed.zero.Init,), {"_zero_init_param": cut})


@contextmanager
def shapes_only(model: nn.Module) -> Iterator[None]:
    """Within it a parameter of stage 3 that is gathered by itself gets its shape, and no values. Local.

    `deepspeed.initialize` gathers each one that trains, to hang a hook on it, and frees it at once.
    """
    parts: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    methods = [(parameter, parameter.all_gather) for parameter in parts]
    for parameter, method in methods:
        parameter.all_gather = partial(_give_shape, parameter, method)
    try:
        yield
    finally:
        for parameter, method in methods:
            parameter.all_gather = method
            parameter.partition()


def _give_shape(parameter: Any, gather: Callable[..., Any], *others: Any, **how: Any) -> Any:
    if others or how:
        return gather(*others, **how)
    one = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    parameter.data = one.expand(parameter.ds_shape)
    parameter.ds_status = type(parameter.ds_status).AVAILABLE


def _fragment(parameter: Tensor, shape: Sequence[int], *, at: int = 0, first: int = 0, values: int = 0) -> Fragment:
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return Fragment(parameter=parameter, at=at, first=first, values=values, columns=columns, rows=rows)


def link_states(engine: Any) -> None:
    """Stages 1 and 2: lets DeepSpeed find each parameter's part of the flat float32 states. Local.

    It does that itself after the first group's first update, when the other groups have no states yet, and never
    again; there is no public call.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
