"""The original model as a structure without storage: which one, its blocks, its buffers.

A model of any size is built on the meta device first, where it takes no memory. There its layers are converted and
sharded; only then does every rank allocate its own part and fill it from a weight source (`weights.py`). This file has
what that needs to know about Hugging Face models, and nothing about LoQT or ranks:

* `load_model_config`: a LLaMA shape of the papers by name, or the config.json of a folder or hub id, with overrides;
* `build_meta_model`: that model on meta;
* `decoder_blocks`: its repeated transformer blocks, the natural units to shard, compile and checkpoint;
* `init_buffers`: the values of its buffers (rotary frequencies and the like), which meta cannot hold.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loqt_scale.config import ModelConfig
from loqt_scale.errors import MissingFileError, UserError, explained, reason_of, shortened

_SHAPES = re.compile(r"size of tensor|shape|mat1 and mat2|dimension")  # in what torch says of widths that do not fit


class LlamaShape(NamedTuple):
    """Widths and depth of a LLaMA model."""

    hidden: int
    intermediate: int
    heads: int
    layers: int


# From 60m to 7b: the GaLore and LoQT papers' models. Below them, shapes for a laptop; 172 and 5461 are on purpose no
# multiples of a quantization block.
PRESETS = {
    "llama_nano": LlamaShape(64, 172, 4, 2),
    "llama_micro": LlamaShape(128, 344, 4, 4),
    "llama_tiny": LlamaShape(256, 688, 4, 6),
    "llama_small": LlamaShape(384, 1024, 6, 8),
    "llama_60m": LlamaShape(512, 1376, 8, 8),
    "llama_130m": LlamaShape(768, 2048, 12, 12),
    "llama_350m": LlamaShape(1024, 2736, 16, 24),
    "llama_1b": LlamaShape(2048, 5461, 32, 24),
    "llama_7b": LlamaShape(4096, 11008, 32, 32),
    "llama_13b": LlamaShape(5120, 13824, 40, 40),
}


# ---- which model ---------------------------------------------------------------------------------------------------


def load_model_config(config: ModelConfig, *, vocab_size: int, seq_len: int) -> PreTrainedConfig:
    """The Hugging Face config of the model that `config` asks for.

    A preset takes its vocabulary from the tokenizer. A config.json is used as it is, so its vocabulary must have room
    for the tokenizer's.

    Args:
        config: Preset or path, and overrides.
        vocab_size: Tokens of the tokenizer.
        seq_len: Tokens per sequence.

    Raises:
        ValueError: Unknown preset or override, a value that the model does not take, a vocabulary or number of
            positions that is too small.
        FileNotFoundError: `model.path` is neither a folder with a config.json nor an id that can be read from the hub.
    """
    fields = _preset_fields(config.preset, vocab_size, seq_len) if config.path is None else _read_fields(config.path)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"model.path: its config.json has model_type {model_type!r}, which transformers does not know")
    config_class = CONFIG_MAPPING[model_type]
    fields = _override(fields, config_class, config.overrides)
    with explained(f"{model_source(config)} do not fit a {model_type} model"):
        hf_config = config_class(**fields)
        hf_config.use_cache = False
    _check_sizes(hf_config, config, vocab_size, seq_len)
    return hf_config


def declared_layers(path: str) -> int:
    """The greatest number of layers that a folder's config.json speaks of, before anything is made of it."""

    def numbers(tree: Any) -> Iterator[int]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from numbers(value)
            elif isinstance(value, int) and re.fullmatch(r"num_(\w+_)?layers|n_layers?", key):
                yield value

    return max(numbers(_read_fields(path)), default=0)


def _preset_fields(preset: str, vocab_size: int, seq_len: int) -> dict[str, Any]:
    if preset not in PRESETS:
        raise UserError(f"model.preset is {preset!r}; write one of {', '.join(PRESETS)}")
    shape = PRESETS[preset]
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": max(1024, seq_len),
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        # LLaMA's own ids are beyond a byte tokenizer's meaning; documents are separated by the tokenizer's.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _read_fields(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub id."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise MissingFileError(f"model.path is {path!r}, which has no config.json; write a folder that has one")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path, local_files_only=Path(path).is_dir())
    except Exception as error:  # not found, not JSON, not UTF-8, no object: the library lets each speak for itself
        raise MissingFileError(_not_found(path, reason_of(error))) from error
    if not fields:
        raise MissingFileError(_not_found(path, "no config.json there"))
    return dict(fields)


def _not_found(path: str, reason: str) -> str:
    what = "its config.json could not be read"
    if not Path(path).exists():
        what = "there is no such folder, and it could not be read as a Hugging Face id"
    return f"model.path is {path!r}: {what} ({reason}); write another folder or id, or use model.preset"


def model_source(config: ModelConfig) -> str:
    """What the model's shape was taken from, for errors."""
    origin = f"model.preset {config.preset}" if config.path is None else f"model.path {config.path}"
    return f"{origin} and model.overrides {shortened(str(config.overrides), 200)}"


def _override(
    fields: dict[str, Any], config_class: type[PreTrainedConfig], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Fields with the overrides in them, under the names that the config class itself uses."""
    aliases = config_class.attribute_map  # e.g. num_hidden_layers -> n_layer for GPT-2
    valid = {*config_class().to_dict(), *fields, *aliases} - {"model_type", "transformers_version", "architectures"}
    for key in overrides:
        if key not in valid:
            near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.0)[0]
            raise UserError(f"model.overrides.{key} is not a field of {config_class.__name__}; did you mean {near}?")
    changes = {aliases.get(key, key): value for key, value in overrides.items()}
    merged = {**fields, **changes}
    # A list with an entry per layer (saved by Qwen2, Gemma) has to follow the number of layers.
    layer_types, layers = merged.get("layer_types"), merged.get(aliases.get("num_hidden_layers", "num_hidden_layers"))
    if layer_types is not None and "layer_types" not in overrides and isinstance(layers, int):
        if layers <= len(layer_types):
            merged["layer_types"] = layer_types[:layers]
        else:
            del merged["layer_types"]
    return merged


def _check_sizes(hf_config: PreTrainedConfig, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
    text = hf_config.get_text_config()
    if text.vocab_size < vocab_size:
        remedy = (
            f"data.tokenizer: {config.path}"
            if config.weights == "pretrained"
            else f"model.overrides: {{vocab_size: {vocab_size}}}"
        )
        raise UserError(
            f"the model's vocab_size is {text.vocab_size}, but the tokenizer has {vocab_size} tokens; write {remedy}"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise UserError(
            f"data.seq_len is {seq_len}, but the model has {positions} positions; write data.seq_len: {positions} or "
            "less, or a larger model.overrides.max_position_embeddings"
        )


def resolve_weights_folder(config: ModelConfig) -> Path:
    """The local folder of `model.path`, downloaded first if it is a hub id (safetensors, if the hub has them).

    Raises:
        ValueError: `model.path` is not set.
        FileNotFoundError: Neither a folder nor an id that can be downloaded.
    """
    if config.path is None:
        raise UserError("model.path is not set; write model.path: FOLDER or a Hugging Face id")
    if Path(config.path).is_dir():
        return Path(config.path)
    try:
        folder = Path(snapshot_download(config.path, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(config.path, allow_patterns=["*.json", "*.bin"]))
    except (OSError, ValueError) as error:
        raise MissingFileError(_not_found(config.path, reason_of(error))) from error
    return folder


def portable_config(hf_config: PreTrainedConfig, *, eos_token_id: int) -> PreTrainedConfig:
    """The config as a finished model carries it: with its cache on, and an end of text.

    Args:
        hf_config: Not changed.
        eos_token_id: The tokenizer's, used where the config names none.
    """
    own = copy.deepcopy(hf_config)
    own.use_cache = True
    text = own.get_text_config()
    if text.eos_token_id is None:
        text.eos_token_id = eos_token_id
    return own


# ---- its structure -------------------------------------------------------------------------------------------------


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
        warnings.warn(f"eager attention is used, because sdpa could not be: {error}", stacklevel=2)
        return model


def check_widths(config: ModelConfig, *, vocab_size: int, seq_len: int) -> None:
    """Takes a forward pass on fake tensors, which hold no values: widths that do not go together show there.

    Fake tensors cannot follow every model (some mixtures of experts). So a model is refused only if another one of its
    kind passes: the one without overrides, or without those the config class's own. A preset as it is needs no check.

    Args:
        config: Which model.
        vocab_size: As for `load_model_config`.
        seq_len: Likewise.

    Raises:
        UserError: The other one computes, this one does not.
    """
    if config.path is None and not config.overrides:
        return
    hf_config = load_model_config(config, vocab_size=vocab_size, seq_len=seq_len)
    error = _forward_error(hf_config)
    if error is None or (not config.overrides and not _SHAPES.search(str(error))):
        return
    reference = type(hf_config)()
    if config.overrides:
        own_vocabulary = 0 if config.path else vocab_size
        reference = load_model_config(replace(config, overrides={}), vocab_size=own_vocabulary, seq_len=1)
    if _forward_error(reference) is None:
        raise UserError(f"no model can be built from {model_source(config)}: {reason_of(error)}") from error


def _forward_error(hf_config: PreTrainedConfig) -> Exception | None:
    """What a model raises when it is built and called on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FakeTensorMode():
        log.disabled = True
        try:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
            model.train()(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
        except Exception as error:  # whatever a model's code stumbles over
            return error
        finally:
            log.disabled = False
    return None


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
    """A copy of a module tree with all parameters and buffers on meta: classes and shapes, no link to the original."""
    clone = bare_copy(module)
    for name, parameter in clone._parameters.items():
        if parameter is not None:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            clone._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for name, buffer in clone._buffers.items():
        clone._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="meta")
    for name, child in clone._modules.items():
        clone._modules[name] = None if child is None else skeleton(child)
    return clone


@contextmanager
def isolated_rng(*key: object) -> Iterator[None]:
    """Run with the CPU generator seeded from a stable hash of `key`; the global random state is back afterwards.

    Not `torch.manual_seed`, which would reseed the accelerators as well.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield


def tied_names(model: nn.Module) -> list[list[str]]:
    """For every distinct parameter, all of its names, the one `named_parameters()` gives first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


# ---- buffers: small, so every rank computes them all ---------------------------------------------------------------


def init_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give every buffer of a model built on meta its true value, on `device`; parameters are not touched.

    A module's own `_init_weights` fills its buffers where it can (rotary frequencies, embedding scales). For the rest
    the model's constructor is run once more with all parameters on meta, so that only the buffers take memory. All
    buffers are computed, also those not on meta: after `to_empty` a buffer has storage and still no value.

    Args:
        model: A `PreTrainedModel`, or a model that contains some; its layers may be converted or sharded already.
        device: Where the buffers go.

    Raises:
        ValueError: Nothing computes one of the buffers.
    """
    rebuilt: dict[str, torch.Tensor] = {}
    for name, path in _module_paths([model]):
        own = {leaf: buffer for leaf, buffer in path[-1]._buffers.items() if buffer is not None}
        covered = _own_buffers(path) if own else {}
        for leaf in own:
            value = covered.get(leaf)
            if value is None:
                full_name = re.sub(r"(_checkpoint_wrapped_module|_orig_mod)\.", "", f"{name}.{leaf}".lstrip("."))
                rebuilt = rebuilt or _rebuilt_buffers(model)
                if full_name not in rebuilt:
                    raise UserError(
                        f"nothing computes the buffer {full_name} (of a {type(path[-1]).__name__}) of a model built on "
                        "meta; cover it in the model's _init_weights"
                    )
                value = rebuilt[full_name]
            path[-1]._buffers[leaf] = value.to(device)


def _module_paths(path: list[nn.Module], name: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """Every module's name with the modules from the root to it."""
    yield name, path
    for leaf, child in path[-1].named_children():
        yield from _module_paths([*path, child], f"{name}.{leaf}".lstrip("."))


def _own_buffers(path: list[nn.Module]) -> dict[str, torch.Tensor]:
    """The buffers of the last module of a path that its nearest model's `_init_weights` writes.

    It runs twice over different fillings; a buffer that comes out the same was written. (NaN would do for floats only.)
    """
    nearest = next((m for m in reversed(path) if isinstance(m, PreTrainedModel)), None)
    if nearest is None:
        return {}
    results = []
    for fill in (0, 1):
        stand_in = skeleton(path[-1])
        for leaf, buffer in path[-1]._buffers.items():
            if buffer is not None:
                stand_in._buffers[leaf] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
        with isolated_rng():
            nearest._init_weights(stand_in)
        results.append(stand_in._buffers)
    zeros, ones = results
    return {leaf: b for leaf, b in zeros.items() if b is not None and torch.equal(b, cast(torch.Tensor, ones[leaf]))}


def _rebuilt_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All buffers of a second instance of the model, whose parameters go to meta as soon as they are registered."""
    if not isinstance(model, PreTrainedModel):
        return {}
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    module_class: Any = nn.Module
    module_class.register_parameter = register_on_meta
    try:
        with isolated_rng(), torch.device("cpu"):
            return dict(type(model)(model.config).named_buffers(remove_duplicate=False))
    finally:
        module_class.register_parameter = register
