"""Swapping a model's `nn.Linear` modules for LoQT layers, by name, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.layers.linear import LoQTLinear


def convert_to_loqt(model: nn.Module, config: LoQTConfig) -> list[str]:
    """Replaces every selected `nn.Linear` of `model` by a `LoQTLinear`, in place.

    Selected are the linears whose dotted name matches a pattern of `config.target_modules` and none of
    `config.exclude_modules` (the output head by default). All other parameters stay as they are and go on training.
    A linear whose weight is tied to another parameter is never converted.

    Args:
        model: Any module; on the meta device nothing is allocated.
        config: The method's settings.

    Returns:
        Names of the converted layers, in module order.

    Raises:
        ValueError: No linear matches, a rank exceeds its layer's smaller side, or a pattern of ranks matches nothing.
    """
    selected = select_linears(model, config)
    linears = {name: model.get_submodule(name) for name in selected}
    _check_ranks(linears, config)
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, LoQTLinear.from_linear(linear, config, rank=config.rank_of(name)))
    return selected


def _check_ranks(linears: Mapping[str, nn.Module], config: LoQTConfig) -> None:
    left = list(linears)
    for pattern in config.rank_pattern:
        others = [name for name in left if not fnmatchcase(name, pattern)]
        if len(others) == len(left):
            raise UserError(
                f"loqt.rank_pattern has {pattern!r}, which no converted layer is left to match after the patterns "
                f"before it; left are: {', '.join(left[:8]) or 'none'}"
            )
        left = others
    tightest = min(linears, key=lambda name: min(_shape(linears[name])) - config.rank_of(name))
    rank, (out_features, in_features) = config.rank_of(tightest), _shape(linears[tightest])
    if rank > min(out_features, in_features):
        key = "loqt.rank" if rank == config.rank else "a rank of loqt.rank_pattern"
        raise UserError(
            f"{key} is {rank}, but {tightest} is {out_features} x {in_features}; write "
            f"{min(out_features, in_features)} or less, or name the layer in loqt.exclude_modules or loqt.rank_pattern"
        )


def select_linears(model: nn.Module, config: LoQTConfig) -> list[str]:
    """Names of the linears that `convert_to_loqt` would replace, in module order.

    Raises:
        ValueError: None matches.
    """
    shared = _shared_weights(model)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    selected = [name for name, linear in linears.items() if id(linear.weight) not in shared and _selected(name, config)]
    if not selected:
        raise UserError(
            f"loqt.target_modules {config.target_modules} (without loqt.exclude_modules {config.exclude_modules}) "
            f"matches no linear layer; the model's are: {', '.join(list(linears)[:8]) or 'none'}"
        )
    return selected


def loqt_layers(model: nn.Module) -> Iterator[tuple[str, LoQTLinear]]:
    """(name, layer) of every LoQT layer of a model, in module order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoQTLinear))


def _shape(linear: nn.Module) -> tuple[int, int]:
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def _selected(name: str, config: LoQTConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.target_modules) and not any(
        fnmatchcase(name, pattern) for pattern in config.exclude_modules
    )


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
