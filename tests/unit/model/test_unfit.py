"""Models that would train on the wrong thing or not at all are refused, before a run's folder is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import CONFIG_MAPPING

from loqt_scale.config import DataConfig, LoQTConfig, ModelConfig, RunConfig
from loqt_scale.errors import UserError
from loqt_scale.model.architectures import load_model_config
from loqt_scale.model.build import design_model
from loqt_scale.model.causality import sees_ahead
from loqt_scale.model.hf_folder import refuse_misread

LLAMA = {
    "model_type": "llama",
    "vocab_size": 290,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def folder(path: Path, **fields: Any) -> str:
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


def load(path: str, *, vocab_size: int = 64, **model: Any) -> Any:
    occurring = model.pop("occurring", None)
    return load_model_config(ModelConfig(path=path, **model), vocab_size=vocab_size, seq_len=16, occurring=occurring)


@pytest.mark.parametrize(("width", "fits"), [(64, True), (96, False), (72, False)])
def test_a_four_bit_weight_that_a_cpu_misreads_is_refused(width: int, fits: bool) -> None:
    """The first two are also what bitsandbytes does: if it mends that, this fails, and the refusal can go."""
    weight = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    linear = Linear4bit(width, 32, bias=False, quant_type="nf4")
    linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    state = linear.weight.quant_state
    by_rows = dequantize_4bit(linear.weight.data, state)
    in_one_row = torch.ops.bitsandbytes.dequantize_4bit(
        linear.weight.data, state.absmax, 64, "nf4", (1, weight.numel()), torch.float32
    )
    if width != 72:
        assert torch.equal(by_rows.flatten(), in_one_row.flatten()) == fits
    if fits:
        refuse_misread(Path("folder"), linear)
        return
    with pytest.raises(UserError, match=f"folder: weight is 4-bit with rows of {width} values.*blocks of 64 divide"):
        refuse_misread(Path("folder"), linear)


def test_models_that_attend_both_ways_are_found_and_those_that_do_not_are_let_through() -> None:
    for kind in ("bert", "roberta", "electra", "xlm", "camembert"):
        assert sees_ahead(CONFIG_MAPPING[kind]()), kind
    for kind in ("bert", "roberta", "electra"):
        assert not sees_ahead(CONFIG_MAPPING[kind](is_decoder=True)), kind
    for kind in ("llama", "gpt2", "opt", "bloom", "falcon", "gemma2", "mixtral", "qwen3_moe", "mamba", "rwkv"):
        assert not sees_ahead(CONFIG_MAPPING[kind]()), kind


def design(path: str, **model: Any) -> Any:
    config = RunConfig(model=ModelConfig(path=path, **model), data=DataConfig(seq_len=16), loqt=LoQTConfig(rank=4))
    return design_model(config, vocab_size=64)


def test_a_trainer_refuses_what_it_cannot_train_and_says_why(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    bert = folder(tmp_path, model_type="bert", num_attention_heads=2, **sizes)
    with pytest.raises(UserError, match=r"this bert model attends both ways.*model\.overrides\.is_decoder: true"):
        design(bert)
    assert design(bert, overrides={"is_decoder": True}).hf_config.is_decoder
    t5 = folder(tmp_path, model_type="t5", vocab_size=64)
    with pytest.raises(UserError, match=r"no model can be built from model\.path .*T5Config"):
        design(t5)
    rwkv = folder(tmp_path, model_type="rwkv", attention_hidden_size=32, **sizes)
    with pytest.raises(UserError, match=r"model\.overrides\.rescale_every: 0"):
        design(rwkv)
    assert design(rwkv, overrides={"rescale_every": 0})
    for kind, fields in (
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 2}),
        ("falcon", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    ):
        assert design(folder(tmp_path, model_type=kind, vocab_size=64, **fields))


def test_chunks_of_the_loss_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    falcon = {"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    with pytest.warns(UserWarning, match=r"loss_chunk_tokens is 8, but it is not known what a falcon model does"):
        design(folder(tmp_path, vocab_size=64, **falcon), loss_chunk_tokens=8)


def test_ids_that_occur_must_fit_and_nothing_else(tmp_path: Path) -> None:
    path = folder(tmp_path, **LLAMA)
    assert load(path, vocab_size=320, occurring=lambda: 290).vocab_size == 290
    with pytest.raises(UserError, match="vocab_size is 290, but the tokenizer has 291 tokens"):
        load(path, vocab_size=320, occurring=lambda: 291)
    with pytest.raises(UserError, match=r"or give the model more rows \(transformers' resize_token_embeddings\)"):
        load(path, vocab_size=320, weights="pretrained")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_weights_that_are_quantized_already_are_refused_as_that(tmp_path: Path, method: str) -> None:
    path = folder(tmp_path, **LLAMA, quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(UserError, match=rf"quantized already \({method}\).*export --format dense"):
        load(path, weights="pretrained")
    assert not hasattr(load(path), "quantization_config")  # of the shape alone nobody needs to know


def test_rope_overrides_count_beside_an_older_config_or_are_refused(tmp_path: Path) -> None:
    old = folder(tmp_path, **LLAMA, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert load(old).rope_parameters["factor"] == 2.0
    assert load(old, overrides={"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5
    whole = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}
    got = load(old, overrides={"rope_parameters": whole}).rope_parameters
    assert (got["factor"], got["rope_theta"]) == (4.0, 7.0)
    both = {"rope_parameters": whole, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    with pytest.raises(UserError, match=r"model\.overrides\.rope_parameters has no effect beside"):
        load(old, overrides=both)
