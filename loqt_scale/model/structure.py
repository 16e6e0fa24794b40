"""A model's structure without storage: built on the meta device, its blocks, copies of its module tree.

A model of any size is built on the meta device first, where it takes no memory. There its layers are converted and
sharded; only then does every rank allocate its own part and fill it from a weight source (`weights`).
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies import whole_shape


def build_meta_model(hf_config: PreTrainedConfig, *, attn_implementation: str = "sdpa") -> nn.Module:
    """The causal language model on meta: float32 shapes without storage, tied embeddings tied, in train mode.

    Args:
        hf_config: Not changed; the model gets a copy with `use_cache=False`.
        attn_implementation: As transformers names it: sdpa (eager where the architecture lacks it, as Gemma 2 does,
            with a warning), eager, ...

    Raises:
        ValueError: The architecture has no causal language model, or lacks this attention.
    """
    own = copy.deepcopy(hf_config)
    own.use_cache = False

    def build(attention: str) -> nn.Module:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                own, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
        return cast(nn.Module, model.train())

    try:
        return build(attn_implementation)
    except ValueError as error:
        if attn_implementation != "sdpa":
            raise
        model = build("eager")  # if the attention was not the trouble, this raises the same error
        warn_caller(f"eager attention is used, because sdpa could not be: {error}")
        return model


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated transformer blocks in order, with their names; empty if there are none.

    They are the longest `nn.ModuleList` of one class whose members hold matrices. Lists inside of such a list (experts
    of a block) do not count, and a matrix need not be an `nn.Linear`: GPT-2 has its own class, a converted layer too.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        has_matrices = all(any(p.dim() >= 2 for p in item.parameters()) for item in module)
        if has_matrices and len({type(item) for item in module}) == 1:
            found.append((name, module))
    if not found:
        return []
    name, blocks = max(found, key=lambda item: len(item[1]))  # the first of equally long ones
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def count_parameters(model: nn.Module) -> int:
    """Elements of all distinct parameters (a tied one counts once); of the original model, before it is converted."""
    return sum(parameter.numel() for parameter in model.parameters())


def bare_copy(module: nn.Module) -> nn.Module:
    """A module of the same class that shares everything but the registries of parameters, buffers and children.

    Neither the constructor nor the copy protocol is called: a sharded module (FSDP) overrides both.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[registry] = dict(module.__dict__[registry])
    return clone


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module tree with all parameters and buffers on meta: classes and shapes, no link to the original.

    Shapes are those of the whole, where a rank holds a part only.
    """
    clone = bare_copy(module)
    for name, parameter in clone._parameters.items():
        if parameter is not None:
            empty = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
            clone._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for name, buffer in clone._buffers.items():
        clone._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="meta")
    for name, child in clone._modules.items():
        clone._modules[name] = None if child is None else skeleton(child)
    return clone


def tied_names(model: nn.Module) -> list[list[str]]:
    """For every distinct parameter, all of its names, the one `named_parameters()` gives first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
