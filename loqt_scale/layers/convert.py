"""Swapping a model's linear layers for LoQT layers, in place, with a report of what was done and what was left."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers.conversion_report import ConversionReport
from loqt_scale.layers.layer import LoQTLayer
from loqt_scale.layers.names import is_replicated, named_modules
from loqt_scale.layers.saving import save_merged_weights
from loqt_scale.layers.select import select, unmatched_patterns
from loqt_scale.process.caller import warn_caller

LEAST_SHARE = 0.5


def convert_to_loqt(model: nn.Module, config: LoQTConfig) -> ConversionReport:
    """Replaces every selected linear layer of `model` by a `LoQTLinear`, in place; warns if that is less than a half.

    Selected are the layers whose dotted name matches a pattern of `config.target_modules` and none of
    `config.exclude_modules`. Left alone, and named with the reason in the report, are also: layers smaller than the
    rank, tied weights, frozen layers, subclasses of `nn.Linear` that compute something else, and a Hugging Face model's
    head (unless a target pattern other than `*` names it, or `exclude_modules` is empty). All other parameters stay as
    they are and go on training.

    Args:
        model: Any module; on the meta device nothing is allocated.
        config: The method's settings.

    Returns:
        The names of the converted layers, in module order; printed, it is a report.

    Raises:
        ValueError: The model is converted already, no layer matches, all are smaller than the rank, or a pattern of
            ranks matches nothing; or the model is spread over ranks already.
    """
    report = convert(model, config)
    if report.share < LEAST_SHARE:
        warn_caller(f"less than one half of the model became low-rank\n{report}")
    return report


def convert(model: nn.Module, config: LoQTConfig) -> ConversionReport:
    """`convert_to_loqt` without its warning of a small share."""
    check_kinds(model, config)
    _refuse_second(model)
    _refuse_spread(model)
    if isinstance(model, nn.Linear):
        raise UserError("the model is itself a linear layer, which has no place in itself; give nn.Sequential(model)")
    selection = select(model, config)
    _tell_unmatched(model, config)
    report = selection.report(model)
    for candidate, rank in selection.chosen:
        candidate.convert(model, config, rank)
    save_merged_weights(model)
    return report


def _tell_unmatched(model: nn.Module, config: LoQTConfig) -> None:
    for key, pattern in unmatched_patterns(model, config):
        warn_caller(
            f"loqt.{key} has {pattern!r}, which nothing in the model is called; a pattern is of a whole name, so write "
            f"'*{pattern}*' for what has it inside",
        )


def check_kinds(model: object, config: object) -> None:
    """Refuses a model or a config of another type.

    Raises:
        UserError: Its type, and what to write.
    """
    require_kind(model, nn.Module, "the model", "give a torch.nn.Module, the model itself")
    require_kind(config, LoQTConfig, "the config", "give a LoQTConfig: LoQTConfig(rank=128)")


def select_linears(model: nn.Module, config: LoQTConfig) -> list[str]:
    """Names of the layers that `convert_to_loqt` would replace, in module order.

    Raises:
        ValueError: As `convert_to_loqt`.
    """
    return [candidate.name for candidate, _ in select(model, config).chosen]


def loqt_layers(model: nn.Module) -> Iterator[tuple[str, LoQTLayer]]:
    """(plain name, layer) of every LoQT layer of a model, in module order."""
    return ((name, module) for name, module in named_modules(model) if isinstance(module, LoQTLayer))


def _refuse_second(model: nn.Module) -> None:
    layers = [name for name, _ in loqt_layers(model)]
    if layers:
        raise UserError(
            f"this is a second conversion: the model holds {len(layers)} LoQT layers already, e.g. {layers[0]}; call "
            "convert_to_loqt once, on the model as it was made or loaded"
        )


def _refuse_spread(model: nn.Module) -> None:
    """Refuses what holds a model's parameters already, and would not hear of the factors that take their place."""
    parameters = list(model.parameters())
    found = {
        "in DistributedDataParallel": any(map(is_replicated, model.modules())),
        "sharded by fully_shard": any(hasattr(parameter, "placements") for parameter in parameters),
        "partitioned by DeepSpeed (ZeRO stage 3)": any(hasattr(parameter, "ds_id") for parameter in parameters),
    }
    for how, is_so in found.items():
        if is_so:
            raise UserError(
                f"the model is {how} already, which would not hear of the factors; convert_to_loqt(model, config) "
                "first, then wrap or shard it, then make the optimizer"
            )
