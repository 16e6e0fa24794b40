"""Models that end in the loss: by chunks as from the logits that transformers makes, for every architecture named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loqt_scale.data.batching import summed_loss
from loqt_scale.data.packing import IGNORED_LABEL
from loqt_scale.errors import UserError
from loqt_scale.model.balance import check_balance
from loqt_scale.model.build import recompute_blocks
from loqt_scale.model.loss import _CAPPED, _PLAIN, _SCALED, LossHead, end_in_loss
from loqt_scale.model.structure import decoder_blocks

SHAPE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def model_of(kind: str, **changed: Any) -> nn.Module:
    own = OWN.get(kind, {}) | changed
    shape = {"vocab_size": 67} if kind == "gpt2" else SHAPE
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(shape | own)))
    for parameter in model.parameters():  # zeros would hide what is done to the logits
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(1, 67, (3, 17))
    labels = tokens[:, 1:].clone()
    labels[1, 3:7] = IGNORED_LABEL
    return tokens[:, :-1], labels


@pytest.mark.parametrize("kind", [*_PLAIN, *_CAPPED, *_SCALED])
def test_chunks_give_the_loss_of_the_models_own_logits(kind: str) -> None:
    model, (tokens, labels) = model_of(kind), batch()
    expected = summed_loss(model(input_ids=tokens, use_cache=False).logits, labels)
    names, logits = list(model.state_dict()), model(input_ids=tokens).logits
    assert end_in_loss(model, chunk=5) and isinstance(model.get_output_embeddings(), LossHead)
    loss = model(input_ids=tokens, targets=labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(model.state_dict()) == names and torch.equal(model(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole(tied: bool) -> None:
    tokens, labels = batch()
    gradients = []
    for chunk in (0, 5):
        model = model_of("llama", tie_word_embeddings=tied)
        end_in_loss(model, chunk=chunk)
        (model(input_ids=tokens, targets=labels) / 40).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert ("lm_head.weight" in gradients[0]) == (not tied)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_what_fits_a_chunk_keeps_its_bits() -> None:
    """As do models whose head is not known."""
    tokens, labels = batch()
    for kind, shape in (("llama", {}), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32})):
        model = model_of(kind, **shape)
        expected = summed_loss(model(input_ids=tokens, use_cache=False).logits, labels)
        assert end_in_loss(model) == (kind == "llama")
        assert torch.equal(model(input_ids=tokens, targets=labels), expected)
    assert not isinstance(model.get_output_embeddings(), LossHead)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_learn_to_share_tokens_as_transformers_has_it(kind: str) -> None:
    """Gradients of its own loss with `output_router_logits`; the value stays the cross-entropy."""
    tokens, labels = batch()
    counted = (labels != IGNORED_LABEL).sum()
    model = model_of(kind, output_router_logits=True, router_aux_loss_coef=0.5)
    found = model(input_ids=tokens, shift_labels=labels, labels=labels, use_cache=False)
    (found.loss * counted).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert not end_in_loss(model, chunk=5)
    loss = model(input_ids=tokens, targets=labels)
    loss.backward()
    assert loss.item() == pytest.approx((found.loss - 0.5 * found.aux_loss).item() * counted.item(), rel=1e-5)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-5, atol=1e-6)
    off = model_of(kind, output_router_logits=False)
    end_in_loss(off, chunk=0)
    off(input_ids=tokens, targets=labels).backward()
    apart = [n for n, p in off.named_parameters() if not torch.allclose(p.grad, expected[n], rtol=1e-3, atol=1e-5)]
    assert any("gate.weight" in name for name in apart)


def test_a_balance_that_transformers_does_not_compute_is_refused() -> None:
    """Before anything is allocated; in the pass where no small copy could be tried."""
    for kind in ("mixtral", "qwen3_moe"):
        check_balance(model_of(kind, output_router_logits=True).config)
    silent = model_of("deepseek_v3", output_router_logits=True)
    with pytest.raises(UserError, match=r"deepseek_v3 model has .* no auxiliary loss .*output_router_logits: false"):
        check_balance(silent.config)
    silent.config.router_aux_loss_coef = 0.1
    assert not end_in_loss(silent)
    with pytest.raises(UserError, match="so nothing would balance them"):
        silent(input_ids=batch()[0], targets=batch()[1])


def test_compiled_and_recomputed_blocks_balance_too() -> None:
    tokens, labels = batch()
    found = []
    for compiled in (False, True):
        model = model_of("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).train()
        end_in_loss(model)
        if compiled:
            torch.compiler.reset()
            recompute_blocks(model)
            for _, block in decoder_blocks(model):
                block.compile(backend="eager")
        model(input_ids=tokens, targets=labels).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
