"""Does a model attend to what comes later? Tried on a small copy, with two inputs that differ in their last token.

BERT, RoBERTa, ELECTRA and XLM have a class for causal language models, and attend both ways unless `is_decoder` says
otherwise. Trained on next tokens, such a model reads its own labels: its loss falls to nothing and means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from loqt_scale.config import ModelConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import isolated_rng

_POSITIONS, _LAYERS = 8, 2
VOCABULARY = 64
_MOST_VALUES = 2**25  # of a copy whose widths could not be reduced: 256 MB in float64
# A token that is read moves the output by more than this, relatively: tiny models with random weights do so by 1e-3.
_LEAK = {torch.float64: 1e-9, torch.float32: 1e-5}
_SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "moe_intermediate_size"), 48),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **{"head_dim": 16, "d_head": 16, "d_inner": 48, "rotary_dim": 8, "vocab_size": VOCABULARY},
}


Trial = Callable[[Any, torch.dtype], bool | None]
_KNOWN: dict[tuple[Trial, str], bool | None] = {}


def check_causal(config: ModelConfig, hf_config: PreTrainedConfig) -> None:
    """Refuses a model whose output for a token depends on later tokens. A preset is causal.

    A model of which no copy is small enough, or computes, is let through.

    Raises:
        UserError: It does, with what to write.
    """
    if config.path is not None and sees_ahead(hf_config):
        kind = hf_config.model_type
        raise UserError(
            f"model.path: this {kind} model attends both ways, so training on next tokens would show it its own "
            "labels; write model.overrides.is_decoder: true if it has that, or another model"
        )


def sees_ahead(hf_config: PreTrainedConfig) -> bool:
    """Whether the causal language model of this config reads later tokens; False if that cannot be tried."""
    return on_small_copies(hf_config, _leaks) or False


def on_small_copies(hf_config: PreTrainedConfig, trial: Trial) -> bool | None:
    """What a trial finds of small copies of a config's model: the first answer; None if there is none.

    Args:
        hf_config: The config.
        trial: Takes a copy of a few layers, with random weights, in evaluation mode, and its dtype. It returns None, or
            raises, where the copy tells nothing. Its vocabulary is `VOCABULARY`.
    """
    key = trial, str(hf_config.to_json_string(use_diff=False))
    if key not in _KNOWN:
        _KNOWN[key] = _first_answer(hf_config, trial)
    return _KNOWN[key]


def agree(values: Tensor, reference: Tensor, dtype: torch.dtype) -> bool | None:
    """Whether a copy's outputs are the same but for rounding; None if they are no numbers."""
    if not bool(reference.isfinite().all()):
        return None
    return bool((values - reference).abs().max() <= _LEAK[dtype] * reference.abs().max())


def _first_answer(hf_config: PreTrainedConfig, trial: Trial) -> bool | None:
    with isolated_rng(0), torch.no_grad():
        for small in (True, False):
            model = _copy_of(hf_config, small=small)
            if model is None:
                continue
            for dtype in _LEAK:  # grouped products of experts do not know float64
                with suppress(Exception):  # whatever a model's code stumbles over
                    answer = trial(model.to(dtype), dtype)
                    if answer is not None:
                        return answer
    return None


def _copy_of(hf_config: PreTrainedConfig, *, small: bool) -> nn.Module | None:
    """A model of a few layers, and if asked small ones, with random weights; None if there is none."""
    fields = hf_config.to_dict()
    changes: dict[str, Any] = {key: value for key, value in _SMALL.items() if fields.get(key) is not None}
    if not small:
        changes = {key: value for key, value in changes.items() if value in (_LAYERS, VOCABULARY)}
    kinds = fields.get("layer_types")
    if isinstance(kinds, list):
        changes["layer_types"] = (sorted(set(kinds), key=kinds.index) * _LAYERS)[:_LAYERS]
    ends = {key: 0 if key == "pad_token_id" else None for key in fields if key.endswith("_token_id")}
    try:
        own = type(hf_config)(**{**fields, **changes, **ends, "use_cache": False})
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(own, trust_remote_code=False)
        if sum(parameter.numel() for parameter in shapes.parameters()) > _MOST_VALUES:
            return None
        model: nn.Module = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=False)
        return model.eval()
    except Exception:  # widths that do not go together, whatever a model's code stumbles over
        return None


def _leaks(model: nn.Module, dtype: torch.dtype) -> bool | None:
    """Whether earlier outputs follow the last token; None if the copy ignores that token."""
    tokens = torch.arange(10, 10 + _POSITIONS).unsqueeze(0)  # none of the first ids, which may stand for padding
    other = tokens.clone()
    other[0, -1] += _POSITIONS
    first, second = _logits(model, tokens), _logits(model, other)
    if torch.equal(first, second):
        return None  # the last token changes nothing: the copy says nothing
    same = agree(second[:, :-1], first[:, :-1], dtype)
    return None if same is None else not same


def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
