"""Which model is trained: a shape by name, or the config.json of a folder or hub id, with overrides.

What comes out is a Hugging Face config; nothing of the model exists yet. Knows nothing about LoQT or ranks.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, PreTrainedConfig

from loqt_scale.config import ModelConfig
from loqt_scale.errors import MissingFileError, UserError, explained, reason_of, shortened


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


def load_model_config(
    config: ModelConfig, *, vocab_size: int, seq_len: int, occurring: Callable[[], int] | None = None
) -> PreTrainedConfig:
    """The Hugging Face config of the model that `config` asks for.

    A preset takes its vocabulary from the tokenizer. A config.json is used as it is, so its vocabulary must have room
    for the ids that occur.

    Args:
        config: Preset or path, and overrides.
        vocab_size: Rows of an embedding for the tokenizer.
        seq_len: Tokens per sequence.
        occurring: Called if a config.json's vocabulary is smaller than that: how many rows the ids need that occur.
            Default: `vocab_size`.

    Raises:
        ValueError: Unknown preset or override, one that is lost, a value that the model does not take, weights that are
            quantized already, a vocabulary or number of positions that is too small.
        FileNotFoundError: `model.path` is neither a folder with a config.json nor an id that can be read from the hub.
    """
    fields = _preset_fields(config.preset, vocab_size, seq_len) if config.path is None else _read_fields(config.path)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"model.path: its config.json has model_type {model_type!r}, which transformers does not know")
    config_class = CONFIG_MAPPING[model_type]
    _refuse_quantized(fields, config)
    original, fields = fields, _override(fields, config_class, config.overrides)
    with explained(f"{model_source(config)} do not fit a {model_type} model"):
        hf_config = config_class(**copy.deepcopy(fields))
        hf_config.use_cache = False
        _refuse_lost_overrides(hf_config, original, config.overrides)
    _check_sizes(hf_config, config, vocab_size, seq_len, occurring)
    return hf_config


def _refuse_quantized(fields: dict[str, Any], config: ModelConfig) -> None:
    """Weights that are quantized already cannot be read as numbers; of a shape alone nobody wants to know."""
    quantization = fields.pop("quantization_config", None)
    if quantization and config.weights == "pretrained":
        method = quantization.get("quant_method", "some method") if isinstance(quantization, dict) else "some method"
        raise UserError(
            f"model.path is {config.path!r}, whose weights are quantized already ({method}), and LoQT quantizes by "
            "itself; write a folder of unquantized weights (of a run of your own: loqt-scale export --format dense)"
        )


def _refuse_lost_overrides(hf_config: PreTrainedConfig, original: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Config classes ignore some fields where others are there as well, and say nothing."""
    for key, value in overrides.items():
        others = {name: other for name, other in overrides.items() if name != key}
        without = type(hf_config)(**copy.deepcopy(_override(original, type(hf_config), others)))
        without.use_cache = hf_config.use_cache
        if without.to_dict() == hf_config.to_dict() and getattr(hf_config, key, None) != value:
            raise UserError(
                f"model.overrides.{key} has no effect beside the other fields of model.path's config.json; write it as "
                "the folder does, or change its config.json"
            )


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
    if "rope_parameters" in overrides and "rope_scaling" not in overrides:
        merged.pop("rope_scaling", None)  # of an older config.json: it would win in silence
    # A list with an entry per layer (saved by Qwen2, Gemma) has to follow the number of layers.
    layer_types, layers = merged.get("layer_types"), merged.get(aliases.get("num_hidden_layers", "num_hidden_layers"))
    if layer_types is not None and "layer_types" not in overrides and isinstance(layers, int):
        if layers <= len(layer_types):
            merged["layer_types"] = layer_types[:layers]
        else:
            del merged["layer_types"]
    return merged


def _check_sizes(
    hf_config: PreTrainedConfig,
    config: ModelConfig,
    vocab_size: int,
    seq_len: int,
    occurring: Callable[[], int] | None,
) -> None:
    text = hf_config.get_text_config()
    needed = vocab_size
    if text.vocab_size < vocab_size and occurring is not None and config.path is not None:
        needed = min(occurring(), vocab_size)
    if text.vocab_size < needed:
        remedy = (
            f"data.tokenizer: {config.path}, or give the model more rows (transformers' resize_token_embeddings)"
            if config.weights == "pretrained"
            else f"model.overrides: {{vocab_size: {vocab_size}}}"
        )
        raise UserError(
            f"the model's vocab_size is {text.vocab_size}, but the tokenizer has {needed} tokens; write {remedy}"
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
