"""`attach`: one call that gives a training loop of one's own its merges, however its model is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.layers import LoQTLayer, check_kinds, loqt_layers
from loqt_scale.merge import InitialWeights, MergeCoordinator
from loqt_scale.merge.initial_weights import TAKE_BEFORE, check_shape, stored_name
from loqt_scale.model.weights import SafetensorsWeights
from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies import Editing, unwrapped

Given = InitialWeights | nn.Module | Mapping[str, Tensor] | str | PathLike[str] | None


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    config: LoQTConfig,
    *,
    total_steps: int | None = None,
    seed: int = 0,
    initial_weights: Given = None,
    editing: Editing | None = None,
) -> MergeCoordinator:
    """Gives a converted model its merges. Every rank, once model and optimizer are as they will be used.

        merges = attach(model, optimizer, config)
        for batch in batches:
            merges.prepare()
            model(batch).loss.backward()
            optimizer.step()
            merges.finish()
            optimizer.zero_grad()

    Args:
        model: A converted model; or what wraps it: DistributedDataParallel, a DeepSpeed engine, what `fully_shard`,
            torch.compile or Accelerate made of it.
        optimizer: Its optimizer, Accelerate's or several in a list too.
        config: By which the model was converted.
        total_steps: Optimizer steps of the run; None: it has no known end.
        seed: Of the sketches.
        initial_weights: The weights before quantization, for whose error the first merge makes up: a state dict from
            before the conversion, an unconverted model, a folder with safetensors, or anything with `rows`.
        editing: How the model is spread over ranks; default: found.

    Returns:
        What `prepare` and `finish` are called on. If `config.init` asks for it, and no merge has been made yet, P and B
        make up for quantization by now.

    Raises:
        UserError: What cannot work, and the line to write; see `MergeCoordinator`.
    """
    check_kinds(model, config)
    layers = dict(loqt_layers(unwrapped(model)))
    source = initial_weights
    if isinstance(source, (str, PathLike)):
        source = weights_in_folder(Path(source), layers, getattr(unwrapped(model), "base_model_prefix", ""))
    merges = MergeCoordinator(
        model, optimizer, config, total_steps=total_steps, editing=editing, seed=seed, initial_weights=source
    )
    merged = merges.has_merged()
    if not merged:
        merges.check_first_weights()
        merges.begin()
        if source is None and not all(layer.spec.base.kind.exact for layer in layers.values()) and merges.is_main:
            warn_caller(
                "LoQT: what quantization rounded away at the conversion is lost, because attach() was not given the "
                "weights from before it. To have the first merge make up for it: before = model.state_dict(), then "
                "convert_to_loqt(model, config), and attach(..., initial_weights=before), or a folder of safetensors",
            )
    merges.expect_state(merged=merged)
    return merges


def weights_in_folder(folder: Path, layers: Mapping[str, LoQTLayer], prefix: str) -> InitialWeights:
    """A folder's weights, read by rows.

    Args:
        folder: Holds safetensors under the names of the unconverted model, with or without its prefix.
        layers: By name.
        prefix: The name that a headless model's parameters lack, "model" say.

    Raises:
        UserError: There is no such folder, or it lacks a layer's weight, or has it in another shape.
    """
    if not folder.is_dir():
        raise UserError(
            f"initial_weights is {str(folder)!r}, which is no folder; give one that holds model.safetensors "
            "(huggingface_hub.snapshot_download(name) returns it)"
        )
    stored, names = SafetensorsWeights(folder).shapes, {}
    for layer_name, layer in layers.items():
        name = layer.weight_name(layer_name)
        found = stored_name(name, prefix, stored)
        if found is None:
            raise UserError(
                f"initial_weights: the folder has no {name}; take them before the conversion: {TAKE_BEFORE}"
            )
        check_shape(name, stored[found], layer, f"{folder} holds")
        names[name] = found
    return SafetensorsWeights(folder, names)
