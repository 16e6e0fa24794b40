"""Whether transformers computes the auxiliary loss of a mixture's experts, for which `output_router_logits` asks.

Many configs have the setting, and about half of their models do nothing with it. Tried on a small copy.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from loqt_scale.errors import UserError
from loqt_scale.model.causality import on_small_copies
from loqt_scale.model.loss import NO_BALANCE


def check_balance(hf_config: PreTrainedConfig) -> None:
    """Refuses `output_router_logits` of a model that has no auxiliary loss: Llama 4, DeepSeek V3. Local.

    Raises:
        UserError: With what to write.
    """
    if getattr(hf_config, "output_router_logits", False) and on_small_copies(hf_config, _balances) is False:
        raise UserError(NO_BALANCE.format(kind=hf_config.model_type))


def _balances(model: Any, dtype: torch.dtype) -> bool:
    return getattr(model(input_ids=torch.arange(10, 18)[None], use_cache=False), "aux_loss", None) is not None
