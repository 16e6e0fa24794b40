"""Presets, configs with overrides, meta models, their blocks and their buffers, on real transformers models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loqt_scale.config import ModelConfig
from loqt_scale.errors import UserError
from loqt_scale.model.architectures import PRESETS, load_model_config, resolve_weights_folder
from loqt_scale.model.buffers import init_buffers
from loqt_scale.model.fake_pass import check_widths
from loqt_scale.model.structure import build_meta_model, count_parameters, decoder_blocks

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 67,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_LIKE = {**BASE, "intermediate_size": 48}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, "n_positions": 32},
    "gpt_neox": LLAMA_LIKE,
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "phi": LLAMA_LIKE,
    "falcon": BASE,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, "n_positions": 32, "rotary_dim": 8},
}
pytestmark = pytest.mark.filterwarnings("ignore:eager attention is used")


def family_config(family: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**FAMILIES[family])


def load(config: ModelConfig, *, vocab_size: int = 67, seq_len: int = 16) -> PreTrainedConfig:
    return load_model_config(config, vocab_size=vocab_size, seq_len=seq_len)


def save_config(folder: Path, family: str) -> str:
    family_config(family).save_pretrained(folder)
    return str(folder)


# ---- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "vocab_size", "millions"),
    # Counts of the GaLore paper's models, with its 32000-token vocabulary.
    [("llama_60m", 32000, 58), ("llama_130m", 32000, 134), ("llama_350m", 32000, 368), ("llama_1b", 32000, 1339)],
)
def test_presets_have_the_papers_sizes(preset: str, vocab_size: int, millions: int) -> None:
    model = build_meta_model(load(ModelConfig(preset=preset), vocab_size=vocab_size))
    assert round(count_parameters(model) / 1e6) == millions
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_config(preset: str) -> None:
    config = load(ModelConfig(preset=preset), vocab_size=257, seq_len=2000)
    assert (config.vocab_size, config.max_position_embeddings, config.use_cache) == (257, 2000, False)
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, False)
    assert config.hidden_size == config.head_dim * config.num_attention_heads


def test_overrides_reach_what_depends_on_them() -> None:
    config = load(ModelConfig(preset="llama_nano", overrides={"hidden_size": 96, "num_hidden_layers": 3}))
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (96, 24, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(preset="llama_61m"), r"model\.preset is 'llama_61m'; write one of llama_nano, .*llama_13b"),
        (ModelConfig(overrides={"num_hiden_layers": 3}), r"model\.overrides\.num_hiden_layers .* num_hidden_layers\?"),
        (ModelConfig(overrides={"hidden_size": "wide"}), r"model\.overrides .* do not fit a llama model"),
        (ModelConfig(overrides={"vocab_size": 60}), r"vocab_size is 60.* 67 tokens; write model\.overrides: .*67"),
        (ModelConfig(overrides={"max_position_embeddings": 8}), r"data\.seq_len is 16, but the model has 8 positions"),
    ],
)
def test_wrong_settings_say_what_to_write(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(config)


def test_config_of_a_folder(tmp_path: Path) -> None:
    config = load(ModelConfig(path=save_config(tmp_path, "gpt2"), overrides={"num_hidden_layers": 5, "n_head": 8}))
    assert (config.model_type, config.n_layer, config.num_attention_heads, config.n_embd) == ("gpt2", 5, 8, 32)
    with pytest.raises(ValueError, match=r"write data\.tokenizer: "):
        load(ModelConfig(path=str(tmp_path), weights="pretrained"), vocab_size=68)


@pytest.mark.parametrize("layers", [1, 4])
def test_layer_types_follow_the_number_of_layers(tmp_path: Path, layers: int) -> None:
    path = save_config(tmp_path, "gemma2")
    config = load(ModelConfig(path=path, overrides={"num_hidden_layers": layers}))
    assert len(config.layer_types) == layers
    assert len(decoder_blocks(build_meta_model(config))) == layers


def test_missing_paths_name_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"model\.path is .* has no config\.json"):
        load(ModelConfig(path=str(tmp_path)))
    for path in ("no_such/model", str(tmp_path / "not" / "there" / "at_all")):
        with pytest.raises(FileNotFoundError, match=r"model\.path is .* no such folder"):
            load(ModelConfig(path=path))
        with pytest.raises(FileNotFoundError, match=r"model\.path is .* no such folder"):
            resolve_weights_folder(ModelConfig(path=path))
    assert resolve_weights_folder(ModelConfig(path=str(tmp_path))) == tmp_path
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        resolve_weights_folder(ModelConfig())


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_parameters_of_every_family(family: str) -> None:
    config = family_config(family)
    model = build_meta_model(config)
    blocks = decoder_blocks(model)
    assert len(blocks) == 2
    assert all(model.get_submodule(name) is block for name, block in blocks)
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert model.training
    reference = AutoModelForCausalLM.from_config(config)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
    assert count_parameters(model) == sum(p.numel() for p in reference.parameters())


def test_the_given_config_is_left_alone() -> None:
    config = family_config("llama")
    before = config.to_dict()
    assert build_meta_model(config).config.use_cache is False
    assert config.to_dict() == before


def test_no_blocks_and_lists_inside_of_blocks() -> None:
    assert decoder_blocks(nn.Sequential(nn.Linear(2, 2))) == []
    experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))}) for _ in range(3)]
    model = nn.ModuleDict({"norms": nn.ModuleList(nn.LayerNorm(2) for _ in range(9)), "layers": nn.ModuleList(experts)})
    assert [name for name, _ in decoder_blocks(model)] == ["layers.0", "layers.1", "layers.2"]


# ---- buffers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_those_of_a_real_model(family: str, emptied: bool) -> None:
    config = family_config(family)
    model = build_meta_model(config)
    if emptied:  # storage without values, as after sharding
        model.to_empty(device="cpu")
    parameters = {name: (p, p.is_meta or p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    init_buffers(model, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    actual, expected = dict(model.named_buffers()), dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert actual.keys() == expected.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(actual[name], buffer, rtol=0, atol=0)
    for name, (parameter, copy) in parameters.items():
        assert model.get_parameter(name) is parameter
        if isinstance(copy, torch.Tensor):
            torch.testing.assert_close(parameter.detach(), copy, rtol=0, atol=0, equal_nan=True)


def test_scaled_rope_buffers() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = load(ModelConfig(preset="llama_nano", overrides={"rope_parameters": rope}))
    model, reference = build_meta_model(config), AutoModelForCausalLM.from_config(config)
    init_buffers(model, "cpu")
    for (_, actual), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(actual, expected)


class Masked(PreTrainedModel):
    """A model whose mask only its constructor knows, and whose parent initialiser rewrites a child's weight."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.ones_(module.linear.weight)


def test_buffers_that_only_the_constructor_knows() -> None:
    with torch.device("meta"):
        model = Masked(PreTrainedConfig())
    wrapped = nn.Sequential(model)
    model.linear.weight = nn.Parameter(torch.full((4, 4), 7.0))
    init_buffers(model, "cpu")
    assert torch.equal(model.mask, torch.ones(4, 4, dtype=torch.bool).tril())
    assert (model.linear.weight == 7.0).all()  # the initialiser ran on stand-ins only
    with pytest.raises(ValueError, match=r"nothing computes the buffer 0\.mask \(of a Masked\)"):
        init_buffers(wrapped, "cpu")


def test_widths_that_do_not_go_together_are_found_before_anything_is_allocated(tmp_path: Path) -> None:
    good = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
    LlamaConfig(vocab_size=67, **good).save_pretrained(tmp_path)
    whole = ModelConfig(path=str(tmp_path))
    check_widths(whole, vocab_size=67, seq_len=16)
    with pytest.raises(UserError, match=r"no model can be built from model\.path .*overrides .*3.*size of tensor"):
        check_widths(replace(whole, overrides={"num_key_value_heads": 3}), vocab_size=67, seq_len=16)
    LlamaConfig(vocab_size=67, **good, num_key_value_heads=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no model can be built from model\.path .*size of tensor"):
        check_widths(whole, vocab_size=67, seq_len=16)


def test_a_model_that_fake_tensors_cannot_follow_is_not_judged(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_local_experts": 2}
    MixtralConfig(vocab_size=67, num_hidden_layers=2, num_key_value_heads=2, **shape).save_pretrained(tmp_path)
    check_widths(ModelConfig(path=str(tmp_path)), vocab_size=67, seq_len=16)
    check_widths(ModelConfig(path=str(tmp_path), overrides={"num_hidden_layers": 1}), vocab_size=67, seq_len=16)
