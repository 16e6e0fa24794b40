"""A folder of a Hugging Face model as data from a stranger: what is looked at before and after transformers reads it.

The folder is one that a person names, so links are followed: in the hub's own cache every file is one. But nothing in
it may name files elsewhere, bring code along, or fill a model with numbers that are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from loqt_scale.errors import MissingFileError, UserError, explained, first_mistake

# what transformers is told wherever it could run code, ask for leave to, or look elsewhere
CAREFULLY = {"trust_remote_code": False, "local_files_only": True}
ADAPTER = "adapter"  # beside a model: the folder of its adapter
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PlainName = Annotated[str, StringConstraints(pattern=r"^\w[\w.\-]*\.safetensors\z", max_length=256)]
_Rank = Annotated[int, Field(ge=1, lt=2**20)]
_LayerName = Annotated[str, StringConstraints(pattern=r"^\w[\w.\-]*\z", max_length=512)]


class _Index(BaseModel):
    """A `*.safetensors.index.json`: which file of the folder holds which tensor."""

    weight_map: dict[str, _PlainName]


class AdapterSettings(BaseModel):
    """The adapter_config.json of an export: the part of PEFT's LoRA that is written here, and all that is read.

    Args:
        r: The rank.
        lora_alpha: Scale times rank.
        target_modules: Names of the layers.
        rank_pattern: Ranks of layers that have another one, by name.
        alpha_pattern: Scale times rank of those.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: Literal[".."] = ".."
    r: _Rank
    lora_alpha: _Rank
    lora_dropout: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
    bias: Literal["none"] = "none"
    inference_mode: Literal[True] = True
    target_modules: Annotated[list[_LayerName], Field(max_length=2**20)]
    rank_pattern: Annotated[dict[_LayerName, _Rank], Field(max_length=2**20)] = {}
    alpha_pattern: Annotated[dict[_LayerName, _Rank], Field(max_length=2**20)] = {}


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, all of its own folder.

    Raises:
        ValueError: It is no index, or names a file elsewhere.
        FileNotFoundError: A file is not there.
    """
    try:
        names = _Index.model_validate_json(index.read_bytes()).weight_map.values()
    except ValidationError as error:
        raise UserError(f"{index} is no index of safetensors files beside it ({first_mistake(error)})") from None
    files = [index.parent / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise MissingFileError(f"{index.parent}: its index names {file.name}, which is not there")
    return files


def check_folder(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError if a folder names files elsewhere, or code; `config` is what its config.json says."""
    for index in folder.glob("*.safetensors.index.json"):
        indexed_files(index)
    for kind in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, kind, None)):  # kernels of the hub, which are code
            raise UserError(f"{folder}: its config.json asks for code, {getattr(config, kind)!r}; remove that")


def load_folder(path: Path, device: torch.device, dtype: torch.dtype | str) -> Any:
    """A Hugging Face model in eval mode, with the adapter beside it if there is one.

    Raises:
        UserError: The folder is not a whole one, or needs packages that are not installed.
    """
    with explained(f"{path} cannot be read as a Hugging Face model"):
        hf_config = AutoConfig.from_pretrained(path, **CAREFULLY)
        check_folder(path, hf_config)
        quantized = hasattr(hf_config, "quantization_config")
        # a quantized model cannot be moved later; to place it at once takes one more package, accelerate
        placement = {"device_map": {"": device}} if quantized else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, weights_only=True, output_loading_info=True, **CAREFULLY, **placement
        )
        _check_whole(path, info)
        refuse_not_finite(path, model)
        if device.type == "cpu":
            refuse_misread(path, model)
        if (path / ADAPTER).is_dir():
            load_adapter(model, path / ADAPTER)
        return (model if quantized else model.to(device)).eval()


def _check_whole(path: Path, info: dict[str, Any]) -> None:
    """transformers fills in at random what the files lack, with no more than a warning."""
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise UserError(
                f"{path} does not hold the whole model: {len(keys)} {kind.replace('_', ' ')}, e.g. {keys[0]}; write "
                "another folder"
            )


def load_adapter(model: Any, folder: Path) -> None:
    """Gives a model the adapter of an export. transformers' own way would read pickles too, and any class's settings.

    Raises:
        ValueError: It is no adapter as `loqt-scale export` writes them, or not this model's.
        ImportError: peft is not installed.
    """
    try:
        settings = AdapterSettings.model_validate_json((folder / ADAPTER_SETTINGS).read_bytes())
    except ValidationError as error:
        raise UserError(f"{folder / ADAPTER_SETTINGS} is none that loqt-scale wrote ({first_mistake(error)})") from None
    from peft import LoraConfig

    tensors = load_file(folder / ADAPTER_WEIGHTS)
    _refuse(folder, [name for name, tensor in tensors.items() if not _is_finite(tensor)])
    lora = LoraConfig(**settings.model_dump())
    found = model.load_adapter(peft_config=lora, adapter_state_dict=tensors)
    if lacking := sorted([*getattr(found, "missing_keys", ()), *getattr(found, "unexpected_keys", ())]):
        raise UserError(f"{folder} is of another model: {len(lacking)} tensors differ, the first is {lacking[0]}")


def refuse_not_finite(folder: Path, model: nn.Module) -> None:
    """Raises ValueError if a parameter of a loaded model, or a 4-bit one's scales, holds NaN or infinity."""
    _refuse(folder, [name for name, parameter in model.named_parameters() if not _is_finite(parameter)])


def refuse_misread(folder: Path, model: nn.Module) -> None:
    """Raises UserError if a model on a CPU has a 4-bit weight that bitsandbytes (0.50) reads wrongly there.

    Where a row is not a whole number of blocks, its CPU kernel takes another block's scale, without a word.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise UserError(
                f"{folder}: {name} is 4-bit with rows of {state.shape[-1]} values, which on a CPU bitsandbytes reads "
                f"wrongly unless blocks of {state.blocksize} divide them; use a GPU, or export with --format dense"
            )


def _is_finite(tensor: Tensor) -> bool:
    numbers = getattr(getattr(tensor, "quant_state", None), "absmax", tensor)
    return not numbers.is_floating_point() or bool(torch.isfinite(numbers).all())


def _refuse(folder: Path, names: list[str]) -> None:
    if names:
        raise UserError(f"{folder}: {names[0]} holds NaN or infinity; write another folder")
