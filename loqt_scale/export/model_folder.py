"""The folder of an exported model: safetensors files, config, tokenizer, and the run's settings.

Files are planned from shapes; then one after another is filled and written, so an export takes the memory of one file
plus one transformer block. The folder appears, by one rename, when all of it is there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig

from loqt_scale.checkpoint import CONFIG, Checkpoint
from loqt_scale.config import Dtype, ExportFormat, RunConfig
from loqt_scale.errors import UserError
from loqt_scale.export.formats import Adapter, Dense, Format, Nf4, Tensors
from loqt_scale.export.parts import Parts
from loqt_scale.functional.schemes import SCHEMES, FourBit
from loqt_scale.inference.saved_model import RUN_SETTINGS, find_saved, open_saved, saved_settings
from loqt_scale.model.hf_folder import ADAPTER, ADAPTER_SETTINGS, ADAPTER_WEIGHTS, CAREFULLY, AdapterSettings
from loqt_scale.strategies import DTYPES, SingleComm

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?\s*(KB|MB|GB|TB)", re.IGNORECASE)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        folder: Where.
        files: safetensors files of the model.
        size: Bytes of its tensors.
    """

    folder: Path
    files: int
    size: int


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: ExportFormat = "dense",
    dtype: Dtype = "bfloat16",
    max_shard_size: str = "2GB",
    progress: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Writes a checkpoint as a model that `AutoModelForCausalLM.from_pretrained` loads. One process.

    Args:
        checkpoint: A checkpoint's folder, or a run's for its latest.
        out: Folder to write; must not exist yet.
        format: dense = merged weights; nf4 = the 4-bit base, and the low-rank factors as a LoRA adapter.
        dtype: Dtype of what is written dense.
        max_shard_size: Greatest size of a file, e.g. 500MB or 2GB.
        progress: Called with a line for people after each file.

    Raises:
        ValueError: `out` exists, a size that is none, a model without a 4-bit base for format nf4.
        CheckpointError: The checkpoint is missing or damaged.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"out: {out} exists; write a folder that does not")
    if not _SIZE.fullmatch(max_shard_size.strip()):
        raise UserError(f"max_shard_size is '{max_shard_size}'; write a size such as 500MB or 2GB")
    path = find_saved(Path(checkpoint))
    if path is None:
        raise UserError(f"checkpoint: {checkpoint} is a Hugging Face model already; write a checkpoint's folder")
    opened = Checkpoint(path)
    config = saved_settings(opened)
    if format == "nf4":
        _check_four_bit(config)
    saved = open_saved(opened, config, SingleComm(torch.device("cpu")))
    parts, torch_dtype = Parts(saved), DTYPES[dtype]
    if format == "nf4":
        _check_layers(parts)
    hf_config = AutoConfig.from_pretrained(saved.files, **CAREFULLY)
    hf_config.dtype = torch_dtype
    vars(hf_config).pop("auto_map", None)
    with published(out) as folder:
        shutil.copytree(saved.files, folder, dirs_exist_ok=True)
        _drop_code(folder)
        shutil.copy(opened.side_files / CONFIG, folder / RUN_SETTINGS)
        if format == "nf4":
            hf_config.quantization_config = _quantization(saved.design.model, torch_dtype)
            (folder / ADAPTER).mkdir()
            write_tensors(
                folder / ADAPTER,
                ADAPTER_WEIGHTS.removesuffix(".safetensors"),
                parts,
                Adapter(torch_dtype),
                None,
                progress,
            )
            _write_adapter_config(folder / ADAPTER, parts, config.loqt.rank)
            _tell_misread(parts, progress)
        files, size = write_tensors(
            folder,
            "model",
            parts,
            Nf4(torch_dtype) if format == "nf4" else Dense(torch_dtype),
            max_shard_size,
            progress,
        )
        _write_configs(folder, hf_config)
    return Exported(out, files, size)


def write_tensors(
    folder: Path, name: str, parts: Parts, form: Format, max_shard_size: str | None, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Writes `name.safetensors`, or shards and their index as transformers names them; returns (files, bytes).

    Args:
        folder: Exists.
        name: Of the files.
        parts: The parameters.
        form: How each is written.
        max_shard_size: Greatest size of a file, e.g. 2GB; None writes one.
        progress: Called with a line for people after each file.
    """
    outlines = {part.name: form.outline(part) for part in parts.all.values()}
    owners = {key: parameter for parameter, outline in outlines.items() for key in outline}
    flat = {key: tensor for outline in outlines.values() for key, tensor in outline.items()}
    size = sum(tensor.nbytes for tensor in flat.values())
    plan = split_torch_state_dict_into_shards(
        flat, filename_pattern=name + "{suffix}.safetensors", max_shard_size=max_shard_size or size + 1
    )
    for file, keys in plan.filename_to_tensors.items():
        wanted, parameters = set(keys), dict.fromkeys(owners[key] for key in keys)
        tensors: Tensors = {}
        for part, stored in parts.read(parameters):
            tensors |= {key: tensor for key, tensor in form.write(part, stored).items() if key in wanted}
        _refuse_not_finite(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        progress(f"wrote {file}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 2**20:.1f} MiB")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(plan.filename_to_tensors), size


def _refuse_not_finite(tensors: Tensors) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{key} is too large for {tensor.dtype}, though the checkpoint's own numbers are finite")


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if all goes well and is removed otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _drop_code(folder: Path) -> None:
    """Files that were checked may still name code for whoever lets transformers run it; an export names none."""
    for path in folder.glob("*.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.pop("auto_map", None) is not None:
            path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _write_configs(folder: Path, hf_config: PreTrainedConfig) -> None:
    hf_config.save_pretrained(folder)
    GenerationConfig.from_model_config(hf_config).save_pretrained(folder)


def _quantization(model: nn.Module, dtype: torch.dtype) -> BitsAndBytesConfig:
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=dense
    )


def _write_adapter_config(folder: Path, parts: Parts, rank: int) -> None:
    ranks = {part.layer: part.spec.projection.cols for part in parts.all.values() if part.spec is not None}
    others = {layer: own for layer, own in ranks.items() if own != rank}
    settings = AdapterSettings(
        r=rank,
        lora_alpha=rank,  # the scale s is in lora_B
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=others,
    )
    (folder / ADAPTER_SETTINGS).write_text(settings.model_dump_json(indent=2) + "\n")


def _check_layers(parts: Parts) -> None:
    """4-bit layers hold one matrix each, not transposed."""
    specs = {part.name: part.spec for part in parts.all.values() if part.spec is not None}
    experts = [name for name, spec in specs.items() if spec.experts is not None]
    turned = [name for name, spec in specs.items() if spec.transposed]
    if experts:
        raise UserError(
            f"format is nf4, but {experts[0]} holds the matrices of several experts, for which bitsandbytes has no "
            "4-bit layer; write --format dense"
        )
    if turned:
        raise UserError(
            f"format is nf4, but the model stores {turned[0]} transposed (GPT-2's Conv1D), and 4-bit layers do not; "
            "write --format dense"
        )


def _tell_misread(parts: Parts, progress: Callable[[str], None]) -> None:
    """Says it if a CPU will not read the 4-bit form (see `hf_folder.refuse_misread`)."""
    bases = {part.name: part.spec.base for part in parts.all.values() if part.spec is not None}
    cut = [name for name, layout in bases.items() if layout.cols % layout.block_size]
    if cut:
        progress(
            f"NOTE: for GPUs only: on CPUs bitsandbytes 0.50 misreads {len(cut)} of {len(bases)} layers, whose rows "
            f"are not whole blocks ({cut[0]}); there write --format dense"
        )


def _check_four_bit(config: RunConfig) -> None:
    four_bit = isinstance(SCHEMES[config.loqt.quantization.weight], FourBit)
    if config.method == "full" or not four_bit:
        what = "method: full" if config.method == "full" else f"weight scheme {config.loqt.quantization.weight}"
        raise UserError(f"format is nf4, but the run ({what}) has no 4-bit base; write --format dense")
