"""From settings to a model whose every rank holds only its own part.

    meta      the Hugging Face model on the meta device: shapes, no storage
    convert   its linears become LoQT layers, still on meta
    shard     the strategy decides who stores which rows, still on meta
    allocate  `to_empty`: each rank's rows, nothing else
    fill      parameter by parameter, each rank asks the weight source for its rows only, and packs or copies them

So no rank ever holds the full-precision model, and what is filled does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from loqt_scale.config import ModelConfig, RunConfig
from loqt_scale.errors import UserError, explained
from loqt_scale.functional.compensation import row_chunks
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.quantization import pack
from loqt_scale.layers import LoQTLayer, convert, loqt_layers, select_linears
from loqt_scale.merge.placed import initial_rows
from loqt_scale.model.architectures import load_model_config, model_source, resolve_weights_folder
from loqt_scale.model.balance import check_balance
from loqt_scale.model.buffers import init_buffers
from loqt_scale.model.causality import check_causal
from loqt_scale.model.documents import check_documents
from loqt_scale.model.fake_pass import check_widths
from loqt_scale.model.loss import end_in_loss
from loqt_scale.model.structure import build_meta_model, decoder_blocks
from loqt_scale.model.weights import RandomWeights, WeightSource, pretrained_weights
from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies import DTYPES, Editing, Placement, Strategy, whole_shape

MOST_SURPRISES = 0.1  # of the parameters, that stay in full precision though they are no embedding or head


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train.

    Args:
        model: The model, without its strategy's wrapper.
        initial_weights: Source of the weights as they were before quantization.
        dense_layers: Under `method: full`, the linears that `method: loqt` would have converted.
        hf_config: The model's Hugging Face config.
        trained_values: How many numbers train, over all ranks.
    """

    model: nn.Module
    initial_weights: WeightSource
    dense_layers: tuple[str, ...]
    hf_config: PreTrainedConfig
    trained_values: int


@dataclass(frozen=True)
class ModelDesign:
    """A model on the meta device, converted: all that can be wrong with the settings has been found out.

    Args:
        model: The model; no storage.
        weights: Where its values will come from.
        dense_layers: As in `BuiltModel`.
        hf_config: As in `BuiltModel`.
    """

    model: nn.Module
    weights: WeightSource
    dense_layers: tuple[str, ...]
    hf_config: PreTrainedConfig


def design_model(config: RunConfig, *, vocab_size: int, occurring: Callable[[], int] | None = None) -> ModelDesign:
    """Builds and converts the run's model on the meta device. Local.

    Args:
        config: The run.
        vocab_size: The tokenizer's.
        occurring: As for `load_model_config`.

    Raises:
        ValueError: Settings that do not fit the model (see `architectures` and `layers.convert`).
    """
    hf_config = load_model_config(config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, occurring=occurring)
    with explained(f"no model can be built from {model_source(config.model)}"):
        model = build_meta_model(hf_config)
    rows = vocab_size if config.model.path is None else min(vocab_size, hf_config.get_text_config().vocab_size)
    check_widths(config.model, vocab_size=rows, seq_len=config.data.seq_len)
    check_causal(config.model, hf_config)
    check_documents(config.data, hf_config)
    check_balance(hf_config)
    if config.method == "loqt":
        _refuse_rescaling(hf_config)
    hf_config.architectures = [type(model).__name__]
    source = _weight_source(config, model)
    dense_layers: tuple[str, ...] = ()
    if config.method == "loqt":
        report = convert(model, config.loqt)
        if report.surprising_share > MOST_SURPRISES:
            warn_caller(str(report))
    else:
        dense_layers = tuple(select_linears(model, replace(config.loqt, rank=1, rank_pattern={})))  # of any rank
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[config.model.trained_dtype])
    if not end_in_loss(model, chunk=config.model.loss_chunk_tokens) and config.model.loss_chunk_tokens:
        warn_caller(
            f"model.loss_chunk_tokens is {config.model.loss_chunk_tokens}, but it is not known what a "
            f"{hf_config.model_type} model does after its head, or the head is low-rank, or output_router_logits wants "
            "the model's own pass: all logits are held; "
            "write a smaller train.micro_batch_size to save memory",
        )
    return ModelDesign(model, source, dense_layers, hf_config)


def _refuse_rescaling(hf_config: PreTrainedConfig) -> None:
    """RWKV divides weights in place at its first evaluation, against overflow in float16."""
    if hf_config.model_type == "rwkv" and getattr(hf_config, "rescale_every", 0):
        raise UserError(
            "model.path: this rwkv model divides its weights in place when it is evaluated, which packed ones cannot "
            "take; write model.overrides.rescale_every: 0 (the same outputs, but for float16)"
        )


def build_model(design: ModelDesign, config: ModelConfig, strategy: Strategy) -> BuiltModel:
    """Shards, allocates and fills a designed model, in place. Every rank.

    Args:
        design: What `design_model` returned; its model becomes the built one.
        config: Checkpointing and compilation.
        strategy: Where parameters go, and by whom they are filled.
    """
    trained_values = sum(parameter.numel() for parameter in design.model.parameters() if parameter.requires_grad)
    model = place_model(design, config, strategy.placement)
    fill(model, design.weights, strategy.editing)
    return BuiltModel(model, design.weights, design.dense_layers, design.hf_config, trained_values)


def recompute_blocks(model: nn.Module) -> None:
    """Has each transformer block recompute its activations in the backward pass instead of storing them."""
    name = "activation_checkpointing_enable"  # of newer versions of transformers; the other one warns there
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def place_model(design: ModelDesign, config: ModelConfig, placement: Placement) -> nn.Module:
    """Shards and allocates a designed model, in place; its parameters have no values yet. Every rank."""
    model = design.model
    if config.activation_checkpointing:
        recompute_blocks(model)
    blocks = [block for _, block in decoder_blocks(model)]
    if config.compile:
        for block in blocks:
            block.compile()
    model = placement.shard(model, blocks)
    allocate(model, placement)
    return model


def _weight_source(config: RunConfig, model: nn.Module) -> WeightSource:
    if config.model.weights == "random":
        return RandomWeights(model, config.train.seed)
    with explained(f"the weights of model.path {config.model.path} cannot be read"):
        return pretrained_weights(resolve_weights_folder(config.model), model)


def allocate(model: nn.Module, placement: Placement) -> None:
    """Gives a meta-device model storage: this rank's empty rows to its parameters, true values to its buffers. Local.

    `Placement.allocate` alone would give each holder of a tied parameter storage of its own.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, name))
    if any(parameter.is_meta for parameter in model.parameters()):  # else `shard` has allocated them already
        placement.allocate(model)
    for (first, first_name), *others in holders.values():
        for module, name in others:
            setattr(module, name, getattr(first, first_name))
    init_buffers(model, placement.device)


@torch.no_grad()
def fill(model: nn.Module, source: WeightSource, editing: Editing) -> None:
    """Gives every parameter its value; each rank reads and packs its part of the rows only. Every rank.

    LoQT layers get their packed base; P and B are zero (`loqt.init: loftq` sets them before the first step, and the
    first merge, at step 0, in any case).
    """
    filled = set()
    for name, layer in loqt_layers(model):
        filled |= {id(parameter) for parameter in layer.merged_parameters()}
        _fill_base(name, layer, source, editing)
        for parameter in (*layer.projection.parameters(), layer.factor):
            editing.clear(parameter)
    for name, parameter in model.named_parameters():
        if id(parameter) not in filled:
            rows = source.rows(name, *editing.rows_to_fill(parameter))
            editing.fill(parameter, rows.to(editing.device, parameter.dtype))


def _chunks(spec: LowRankSpec, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cuts rows [first, last) of a layer's W into parts that are read at once: some rows, or those of one expert."""
    if spec.experts is None:
        yield from ((first + start, first + stop) for start, stop in row_chunks(last - first, spec.base))
        return
    rows = spec.each.base.rows
    for expert in range(first // rows, -(-last // rows) if last > first else 0):
        yield max(first, expert * rows), min(last, (expert + 1) * rows)


def _fill_base(name: str, layer: LoQTLayer, source: WeightSource, editing: Editing) -> None:
    """Packs this rank's rows of one weight, a chunk of rows at a time, and hands them to whoever stores them."""
    layout, parts = layer.spec.base, list(layer.base.parameters())  # codes, and scales if there are any
    spans = [editing.rows_to_fill(part) for part in parts]  # not the same, where they are cut by values
    start, stop = min(first for first, _ in spans), max(last for _, last in spans)
    chunks = [
        pack(initial_rows(source, name, layer, *rows).to(editing.device), layout)
        for rows in _chunks(layer.spec, *layout.rows_of_groups(start, stop))
    ]
    for index, (part, (first, last)) in enumerate(zip(parts, spans, strict=True)):
        none = torch.empty(0, whole_shape(part)[1], dtype=part.dtype, device=editing.device)  # more ranks than rows
        packed = [piece for chunk in chunks if (piece := chunk[index]) is not None]
        editing.fill(part, torch.cat([none, *packed])[first - start : last - start])
