"""Weights into a converted model, and names that wrappers have changed: right, or refused with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from loqt_scale import LoQTConfig, attach, convert_to_loqt, save_merged, to_dense
from loqt_scale.errors import UserError
from tests.unit.library.test_dense import logits, model_of, trained

CONFIG = LoQTConfig(rank=8)
QUERY = "model.layers.0.self_attn.q_proj"


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_dict_is_refused(strict: bool) -> None:
    model = trained("llama")
    with pytest.raises(UserError, match=r"self_attn\.\w+\.weight is dense.* load these weights before convert_to_loqt"):
        model.load_state_dict(model_of("llama").state_dict(), strict=strict)
    model.load_state_dict(model.state_dict())


def test_initial_weights_must_be_those_of_the_model() -> None:
    model = model_of("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert_to_loqt(model, CONFIG)
    weight = f"{QUERY}.weight"
    others = {name: torch.randn_like(tensor) for name, tensor in before.items()}
    wrong = {
        r"not what this model was quantized from": others,
        rf"hold {weight} as \(32, 31\), but the layer is": {**before, weight: before[weight][:, :31]},
        r"is torch.int64, not floating-point": {**before, weight: before[weight].long()},
        rf"have no {weight}": {name: tensor for name, tensor in before.items() if name != weight},
    }
    for message, given in wrong.items():
        with pytest.raises(UserError, match=message):
            attach(model, adamw(model), CONFIG, initial_weights=given)
    one = {**before, weight: before[weight].flip(0)}  # one layer's alone
    with pytest.raises(UserError, match=rf"{weight} is not what"):
        attach(model, adamw(model), CONFIG, initial_weights=one)
    for right in (before, {f"module.{name}": tensor.bfloat16() for name, tensor in before.items()}):
        attach(model, adamw(model), CONFIG, initial_weights=right)
    headless = {name.removeprefix("model."): tensor for name, tensor in before.items()}
    attach(model, adamw(model), CONFIG, initial_weights=headless)


def test_wrapped_blocks_have_plain_names(tmp_path: Path) -> None:
    model, want = model_of("llama"), list(model_of("llama").state_dict())
    before = model.state_dict()
    layers = model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = torch.compile(layers[1], backend="eager")
    report = convert_to_loqt(model, LoQTConfig(rank=8, exclude_modules=["model.layers.1.mlp.*", "lm_head"]))
    assert QUERY in report and not any("layers.1.mlp" in name for name in report)
    attach(model, adamw(model), CONFIG, initial_weights=before)
    dense = to_dense(model.eval())
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    assert list(dense.state_dict()) == want
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()  # what it computes with is its own
    assert not logits(dense).any() and logits(model).any()
    save_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "usual")
    for folder in ("merged", "usual"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == set(want)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(16, 16)}), "fc": nn.Linear(16, 16)})
    before = model.state_dict()
    assert list(convert_to_loqt(model, LoQTConfig(rank=4))) == ["module.fc", "fc"]
    attach(model, adamw(model), LoQTConfig(rank=4), initial_weights=before)
    save_merged(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(before) == set(to_dense(model).state_dict())


def test_the_weight_of_a_layer_cannot_be_replaced_or_drawn_anew() -> None:
    model = trained("llama")
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match="cannot be tied, pruned or replaced"):
        layer.weight = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(UserError, match="initialize the model, then convert_to_loqt"):
        layer.reset_parameters()
