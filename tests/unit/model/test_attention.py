"""Attention without a mask gives the bits of attention with one, and is refused where there is more to mask."""

from __future__ import annotations

import pytest
import torch

from loqt_scale.model.attention import ARCHITECTURES, attend_causally
from loqt_scale.model.buffers import init_buffers
from loqt_scale.model.structure import build_meta_model
from tests.unit.model.test_models import family_config


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_bits_are_those_of_the_masked_model(family: str) -> None:
    model = build_meta_model(family_config(family))
    model.to_empty(device="cpu")
    init_buffers(model, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 67, (3, 16))
    masked = model(input_ids=tokens).logits
    assert attend_causally(model, 16)
    assert torch.equal(model(input_ids=tokens).logits, masked)


def test_what_has_more_to_mask_keeps_its_mask() -> None:
    windowed = family_config("mistral")
    windowed.sliding_window = 8
    assert not attend_causally(build_meta_model(windowed), 16)
    assert attend_causally(build_meta_model(windowed), 8)
    assert not attend_causally(build_meta_model(family_config("gemma3_text")), 16)
    eager = build_meta_model(family_config("llama"), attn_implementation="eager")
    assert not attend_causally(eager, 16)
