"""What a run's merges depend on, as plain data: kept with the position, and compared when a run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_linear import resolve_side
from loqt_scale.layers import LoQTLayer

_OF_TENSORS = ("layers",)  # what no run may change: it says what stored tensors mean

STATE_VERSION = 1  # of a coordinator's state dict


def settings_of(
    layers: Mapping[str, LoQTLayer], config: LoQTConfig, *, seed: int, total_steps: int | None
) -> dict[str, Any]:
    """All that merges depend on, as JSON could hold it.

    Args:
        layers: By name.
        config: The method's settings.
        seed: Of the sketches.
        total_steps: Of the run, if it is known.
    """
    settings = {
        "seed": seed,
        "total_steps": total_steps,
        "subspace": dataclasses.asdict(config.subspace),
        "merge": dataclasses.asdict(config.merge),
        "layers": {name: layer_settings(layer) for name, layer in layers.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def layer_settings(layer: LoQTLayer) -> dict[str, Any]:
    """What a layer's stored tensors mean."""
    spec = layer.spec
    return {
        "shape": list(layer.weight_shape()),
        "rank": spec.projection.cols,
        "scale": spec.scale,
        "side": spec.side,
        "weight": spec.base.scheme,
        "projection": spec.projection.scheme,
        "block_size": spec.base.block_size,
    }


def check_settings(saved: Mapping[str, Any], ours: Mapping[str, Any], *, strict: bool) -> list[str]:
    """Refuses settings with which a run cannot go on.

    Args:
        saved: `settings_of` when the state was saved.
        ours: Now.
        strict: Whether nothing may differ; else only what stored tensors mean may not.

    Returns:
        What differs and may, in words.

    Raises:
        UserError: What differs and may not, with both values.
    """
    found = differences(saved, ours)
    if fatal := [text for key, text in found.items() if key in _OF_TENSORS]:
        raise UserError(f"the saved state is of other layers: {fatal[0]}; convert the model as it was then")
    words = list(found.values())
    if words and strict:
        raise UserError(
            f"the saved state is of other settings: {'; '.join(words)}; write them as they were, or say "
            "load_state_dict(state, strict=False) to go on with the new ones"
        )
    return words


def differences(
    saved: Mapping[str, Any], ours: Mapping[str, Any], words: str = "{0} was {1!r} and is {2!r}"
) -> dict[str, str]:
    """What differs, in words, by the settings' names, "merge.gap" say; of layers the first difference only.

    Args:
        saved: Settings as `settings_of` returns them.
        ours: Others.
        words: Of a setting's name and both values.
    """
    found = {}
    for key, value in ours.items():
        theirs = saved.get(key)
        if theirs == value:
            continue
        if key in _OF_TENSORS:
            found[key] = _of_layers(theirs or {}, value)
        elif isinstance(value, Mapping):
            old, new = ({f"{key}.{name}": each for name, each in group.items()} for group in (theirs or {}, value))
            found |= differences(old, new, words)
        else:
            found[key] = words.format(key, theirs, value)
    return found


def check_config(layers: Mapping[str, LoQTLayer], config: LoQTConfig) -> None:
    """Refuses a config that is not the one by which the model was converted.

    Raises:
        UserError: The setting and both values.
    """
    for name, layer in layers.items():
        found = layer_settings(layer) | {"side": layer.spec.applied_side}
        for key, values in _wanted(layer, config).items():
            if found[key] not in values:
                said = " or ".join(map(repr, values))
                raise UserError(
                    f"{name} was converted with {key} {found[key]!r}, but the config says {said}; give "
                    "convert_to_loqt and the merges one config"
                )


def _wanted(layer: LoQTLayer, config: LoQTConfig) -> dict[str, list[Any]]:
    """What a config may have made of a layer. Any of its ranks, because the model may have got another name since."""
    quantization = config.quantization
    return {
        "rank": list(dict.fromkeys(config.ranks)),
        "side": [resolve_side(config.side, *layer.spec.each.features)],
        "scale": [config.scale],
        "weight": [quantization.weight],
        "projection": [quantization.projection],
        "block_size": [quantization.block_size],
    }


def _of_layers(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    for name in ours.keys() | saved.keys():
        if name not in saved or name not in ours:
            return f"{name} is a LoQT layer {'now, and was none' if name in ours else 'no more'}"
        for key, value in ours[name].items():
            if saved[name].get(key) != value:
                return f"{name} had {key} {saved[name].get(key)!r} and has {value!r}"
    return "something that is not known here"
