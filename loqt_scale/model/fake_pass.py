"""A forward pass on tensors without values: do the widths of a config go together?"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from loqt_scale.config import ModelConfig
from loqt_scale.errors import UserError, reason_of
from loqt_scale.model.architectures import load_model_config, model_source

_SHAPES = re.compile(r"size of tensor|shape|mat1 and mat2|dimension")  # in what torch says of widths that do not fit


def check_widths(config: ModelConfig, *, vocab_size: int, seq_len: int) -> None:
    """Takes a forward pass on fake tensors, which hold no values: widths that do not go together show there.

    Fake tensors cannot follow every model (some mixtures of experts). So a model is refused only if another one of its
    kind passes: the one without overrides, or without those the config class's own. A preset as it is needs no check.

    Args:
        config: Which model.
        vocab_size: As for `load_model_config`.
        seq_len: Likewise.

    Raises:
        UserError: The other one computes, this one does not.
    """
    if config.path is None and not config.overrides:
        return
    hf_config = load_model_config(config, vocab_size=vocab_size, seq_len=seq_len)
    error = _forward_error(hf_config)
    if error is None or (not config.overrides and not _SHAPES.search(str(error))):
        return
    reference = type(hf_config)()
    if config.overrides:
        own_vocabulary = 0 if config.path else vocab_size
        reference = load_model_config(replace(config, overrides={}), vocab_size=own_vocabulary, seq_len=1)
    if _forward_error(reference) is None:
        raise UserError(f"no model can be built from {model_source(config)}: {reason_of(error)}") from error


def _forward_error(hf_config: PreTrainedConfig) -> Exception | None:
    """What a model raises when it is built and called on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FakeTensorMode():
        log.disabled = True
        try:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
            model.train()(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
        except Exception as error:  # whatever a model's code stumbles over
            return error
        finally:
            log.disabled = False
    return None
