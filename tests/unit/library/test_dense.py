"""A converted model as an ordinary one again, in memory and as a folder."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from loqt_scale import LoQTConfig, convert_to_loqt, save_merged, to_dense
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from tests.distributed.instruments import allocations

TOKENS = torch.arange(24).reshape(2, 12)


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=2, n_positions=32, **ends))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tied = kind == "tied"
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes, **ends))


def trained(kind: str) -> PreTrainedModel:
    """Converted, with factors and projections that are not zero."""
    model = model_of(kind)
    convert_to_loqt(model, LoQTConfig(rank=8))
    with torch.no_grad():
        for _, layer in loqt_layers(model):
            layer.projection.store(torch.randn(layer.spec.projection.rows, layer.rank))
            layer.factor.normal_(std=0.02)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def unlike_random(model: nn.Module) -> float:
    return float((logits(model) - logits(model_of("llama"))).abs().max())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied"])
def test_a_dense_copy_and_what_from_pretrained_reads_compute_the_same(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    want, before = logits(model), copy.deepcopy(model.state_dict())
    dense = to_dense(model)
    assert type(dense) is type(model) and not list(loqt_layers(dense))
    torch.testing.assert_close(logits(dense), want, rtol=1e-4, atol=1e-5)
    assert list(dense.state_dict()) == list(model_of(kind).state_dict())
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == (kind != "llama")
    save_merged(model, tmp_path / "merged", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "as_usual")
    dense.save_pretrained(tmp_path / "dense")
    copy.deepcopy(model).save_pretrained(tmp_path / "copied")
    for folder in ("merged", "as_usual", "dense", "copied"):
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), want, rtol=1e-4, atol=1e-5
        )
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_and_pickles_of_a_converted_model_save_merged_weights_too(tmp_path: Path) -> None:
    model = trained("llama")
    model.model.save_pretrained(tmp_path / "base")
    assert not [name for name in load_file(tmp_path / "base" / "model.safetensors") if "codes" in name]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    again.save_pretrained(tmp_path / "pickled")
    with torch.no_grad():
        for _, layer in loqt_layers(again):
            layer.factor.zero_()  # what is written is the copy's own
    again.save_pretrained(tmp_path / "other")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("pickled", "other"))
    torch.testing.assert_close(logits(one), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(other) - logits(model)).abs().max() > 1e-2


def test_a_copy_is_on_its_own_and_of_the_wanted_dtype(tmp_path: Path) -> None:
    model = trained("llama")
    dense = to_dense(torch.compile(model, backend="eager"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    want = logits(model)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), want)
    save_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert (logits(again).float() - want).abs().max() < 0.05


def test_any_module_goes_back(tmp_path: Path) -> None:
    class Shared(nn.Module):
        """A layer under two names, and buffers."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.again = self.first
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.again(self.first(x)))

    model, x = Shared(), torch.randn(8, 16)
    names = list(model.state_dict())
    convert_to_loqt(model, LoQTConfig(rank=4))
    assert model.first is model.again
    model(x)
    dense = to_dense(model.eval())
    assert dense.first is dense.again and list(dense.state_dict()) == names
    torch.testing.assert_close(dense(x), model(x))
    save_merged(model, tmp_path / "out")
    files = load_file(tmp_path / "out" / "model.safetensors")
    (kept,) = {"first.weight", "again.weight"} & set(files)  # a tied tensor is written once
    assert "norm.running_mean" in files and torch.equal(files[kept], dense.first.weight)


def test_another_librarys_save_pretrained_is_told_what_to_write(tmp_path: Path) -> None:
    class Hub(nn.Sequential):
        """As diffusers has it: no `state_dict`."""

        def save_pretrained(self, save_directory: Path) -> None:
            torch.save(self.state_dict(), save_directory)

    model = Hub(nn.Linear(16, 16))
    convert_to_loqt(model, LoQTConfig(rank=4))
    with pytest.raises(UserError, match=r"to_dense\(model\)\.save_pretrained\(folder\)"):
        model.save_pretrained(tmp_path / "no.pt")
    to_dense(model).save_pretrained(tmp_path / "yes.pt")
    assert list(torch.load(tmp_path / "yes.pt")) == ["0.weight", "0.bias"] and not (tmp_path / "no.pt").exists()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no LoQT layer"):
        to_dense(nn.Linear(4, 4))
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(UserError, match=r"dtype is .*int8|dtype is 'bfloat16'; write a floating-point one"):
            save_merged(trained("llama"), tmp_path / "not there", dtype=dtype)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists; write a folder that does not"):
        save_merged(trained("llama"), tmp_path / "there")


def test_going_back_needs_the_dense_model_and_about_its_largest_matrix(tmp_path: Path) -> None:
    """Of torch's allocator, above the converted model; writers of files need more (benchmarks/dense.py)."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    dense, largest = sum(p.nbytes for p in model.parameters()), 4 * 128 * 384
    convert_to_loqt(model, LoQTConfig(rank=32))
    with allocations() as whole:
        copied = to_dense(model)
    with allocations() as half:
        short = to_dense(model, dtype=torch.bfloat16)
    with allocations() as saved:
        save_merged(model, tmp_path / "merged")
    assert dense <= whole.kept < dense + 4096 and whole.passing < 1.5 * largest
    assert dense // 2 <= half.kept < dense // 2 + 4096 and half.passing < 1.5 * largest
    assert saved.kept < 4096 and dense < saved.passing < dense + 1.5 * largest
    assert copied.dtype == torch.float32 and short.dtype == torch.bfloat16
