"""From a converted model back to an ordinary one: in memory, or as a folder that `from_pretrained` reads.

Both read the model's own tensors, a layer at a time, also where FSDP2 or ZeRO has sharded them: then all ranks must
call them. The converted model stays as it is and can go on training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from loqt_scale.errors import UserError, require_kind
from loqt_scale.export.model_folder import published
from loqt_scale.layers import LoQTLinear
from loqt_scale.layers.experts import ExpertsForward
from loqt_scale.layers.frozen import FrozenMatrix
from loqt_scale.layers.layer import LoQTLayer
from loqt_scale.layers.names import named_modules
from loqt_scale.layers.saving import PACKED, merged_weight
from loqt_scale.strategies import unwrapped
from loqt_scale.strategies.whole import (
    all_succeeded,
    is_first_rank,
    is_of_engine,
    is_sharded,
    reshard,
    unsharded_class,
    whole,
)

_OWN = ("_parameters", "_buffers", "_modules", "_compiled_call_impl", "save_pretrained")


@torch.no_grad()
def to_dense(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of a converted model with ordinary linear layers of the merged weights. Every rank, if it is sharded.

    The copy shares nothing with the model: classes, settings, tied parameters, buffers and hooks are as they were, but
    for the hooks of FSDP2 and DeepSpeed, and for torch.compile around single blocks, which the copy lacks. Every rank
    gets a whole one, and needs the memory of it.

    Args:
        model: The converted model, or what wraps it: DistributedDataParallel, a DeepSpeed engine, torch.compile.
        device: Of the copy; default: the model's, or the CPU if the model is sharded.
        dtype: Of the copy's floating-point tensors; default: as in the model, of merged weights that of the factors.

    Raises:
        UserError: The model has no LoQT layer, or the dtype is none of floating-point numbers.
    """
    inner = _opened(model, dtype)
    return _Copy(inner, device, dtype).make()


@torch.no_grad()
def save_merged(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes a converted model with merged weights; of a Hugging Face model what `from_pretrained` loads.

    Rank 0 collects the dense model in the host's memory and writes it; the folder appears, by one rename, when all of
    it is there. Other models get safetensors files alone, under the names of the unconverted model. Every rank, if the
    model is sharded; else the others need not call it, and do not wait if they do.

    Args:
        model: The converted model, or what wraps it: DistributedDataParallel, a DeepSpeed engine, torch.compile.
        folder: Must not exist yet.
        dtype: Of what is written; default: as in the model, of merged weights that of the factors.
        max_shard_size: Greatest size of a file.

    Raises:
        UserError: As `to_dense`; the folder exists, or another rank could not write.
    """
    inner, folder = _opened(model, dtype), Path(folder)
    first, error = is_first_rank(), None
    together = any(map(is_sharded, inner.parameters()))
    device = next(inner.parameters()).device if together else None
    if not (first or together):
        return
    if not all_succeeded(not (first and folder.exists()), device):
        raise UserError(f"folder: {folder} exists; write a folder that does not")
    state: dict[str, Tensor] = {}
    for name, tensor in _dense_tensors(inner, dtype, keep=first):
        if first:
            state[name] = tensor
    try:
        if first:
            _write(inner, folder, state, dtype, max_shard_size)
    except Exception as exception:  # the other ranks wait to hear of it
        error = exception
    if not all_succeeded(error is None, device):
        raise error or UserError(f"rank 0 could not write {folder}; its own error says why")


def _opened(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    require_kind(model, nn.Module, "the model", "give the converted model, or what wraps it")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype is {dtype!r}; write a floating-point one, torch.bfloat16 say")
    inner = unwrapped(model)
    if not any(isinstance(module, LoQTLayer) for module in inner.modules()):
        raise UserError("the model has no LoQT layer, so there is nothing to merge; save it as it is")
    reshard(inner)
    return inner


def _write(model: Any, folder: Path, state: dict[str, Tensor], dtype: torch.dtype | None, size: str | int) -> None:
    with published(folder) as partial:
        if not hasattr(type(model), "save_pretrained"):
            save_torch_state_dict(state, partial, max_shard_size=size)
            return
        type(model).save_pretrained(model, partial, state_dict=state, max_shard_size=size)
        settings = partial / "config.json"
        if dtype is not None and settings.exists():
            tree = json.loads(settings.read_text(encoding="utf-8"))
            settings.write_text(json.dumps({**tree, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def _dense_tensors(model: nn.Module, dtype: torch.dtype | None, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor in host memory) of the unconverted model's state dict, a tied one as the same. Every rank.

    Args:
        model: The converted model.
        dtype: As `save_merged` has it.
        keep: Whether this rank wants them; else it only takes part, and gets empty ones.
    """
    seen: dict[int, Tensor] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        for key, tensor, read in _reads(module):
            if id(tensor) not in seen:
                value = read(dtype)
                seen[id(tensor)] = _moved(value, torch.device("cpu"), dtype) if keep else value.new_empty(0)
            is_weight = isinstance(module, LoQTLayer) and key == "weight"
            full = cast(LoQTLayer, module).weight_name(name) if is_weight else f"{name}.{key}"
            yield full.lstrip("."), seen[id(tensor)]


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """A tensor of its own elsewhere, in `dtype` if it is floating-point."""
    return tensor.to(device or tensor.device, dtype if tensor.is_floating_point() else None, copy=True)


Read = Callable[[torch.dtype | None], Tensor]


def _reads(module: nn.Module) -> Iterator[tuple[str, Tensor, Read]]:
    """What a module's own state is without LoQT: (name in it, what identifies it, how to read it whole)."""
    if isinstance(module, FrozenMatrix):
        return  # part of a layer
    named: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if isinstance(module, LoQTLayer):
        yield "weight", named.pop("factor"), partial(_merged, module)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    named |= {key: buffer for key, buffer in buffers if key not in module._non_persistent_buffers_set}
    for key, tensor in named.items():
        yield key, tensor, partial(_whole, tensor)


def _whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    with whole([tensor]) as (value,):
        return value.clone()


def _merged(layer: LoQTLayer, dtype: torch.dtype | None) -> Tensor:
    named = {name: parameter for name, parameter in layer.named_parameters() if name in PACKED}
    with whole(list(named.values())) as values:
        return merged_weight(layer, dict(zip(named, values, strict=True)), dtype)


def _class_before(module: nn.Module) -> type[nn.Module]:
    """A module's class before sharding and conversion."""
    kind = unsharded_class(module)
    return kind.__bases__[1] if issubclass(kind, ExpertsForward) else kind


class _Copy:
    """A copy of a module tree, LoQT layers dense. Every module exists before any attribute is copied: they refer."""

    def __init__(self, model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if device is None and any(is_sharded(parameter) for parameter in model.parameters()):
            device = "cpu"
        self._model, self._device, self._dtype = model, None if device is None else torch.device(device), dtype
        self._memo: dict[int, Any] = {}

    def make(self) -> nn.Module:
        copied, compiled = [], []
        for module in self._model.modules():
            if isinstance(module, LoQTLinear):
                self._memo[id(module)] = self._dense(module)
            elif "_orig_mod" in module._modules:  # torch.compile's, which would go on to call the original
                compiled.append(module)
            elif not isinstance(module, (LoQTLayer, FrozenMatrix)):
                self._memo[id(module)] = object.__new__(_class_before(module))
                copied.append(module)
        for module in compiled:
            self._memo[id(module)] = self._memo[id(unwrapped(module))]
        for module in copied:
            self._fill(self._memo[id(module)], module)
        made: nn.Module = self._memo[id(self._model)]
        return made

    def _fill(self, clone: nn.Module, module: nn.Module) -> None:
        state = clone.__dict__
        for registry in ("_parameters", "_buffers"):
            own = getattr(module, registry).items()
            state[registry] = {key: None if value is None else self._tensor(value) for key, value in own}
        state["_modules"] = {}
        for key, child in module._modules.items():
            if isinstance(child, LoQTLayer) and not isinstance(child, LoQTLinear):  # in the place of a parameter
                state["_parameters"][key] = self._weight(child)
            else:
                state["_modules"][key] = None if child is None else self._memo[id(child)]
        for key, value in module.__dict__.items():
            if key not in _OWN:
                state[key] = self._attribute(key, value)
        state["_compiled_call_impl"] = None

    def _attribute(self, key: str, value: Any) -> Any:
        if key.endswith("_hooks") and isinstance(value, dict):
            value = type(value)((number, hook) for number, hook in value.items() if not is_of_engine(hook))
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # an engine's own, a process group, a lock: shared
            return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._memo:
            value = _moved(_whole(tensor), self._device, self._dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            self._memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        held: Tensor = self._memo[id(tensor)]
        return held

    def _weight(self, layer: LoQTLayer) -> nn.Parameter:
        return nn.Parameter(_moved(_merged(layer, self._dtype), self._device, self._dtype))

    def _dense(self, layer: LoQTLinear) -> nn.Module:
        weight = self._weight(layer)
        bias = None if layer.bias is None else cast(nn.Parameter, self._tensor(layer.bias))
        if layer.spec.transposed:
            from transformers.pytorch_utils import Conv1D

            dense: nn.Module = Conv1D(*reversed(weight.shape))
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        dense._parameters.update({"weight": weight, "bias": bias})
        return dense.train(layer.training)
