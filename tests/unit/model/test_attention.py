"""Attention without a mask gives the bits of attention with one, and is refused where there is more to mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loqt_scale.config import DataConfig
from loqt_scale.errors import UserError
from loqt_scale.model.attention import ARCHITECTURES, PACKED, attend_packed, no_mask
from loqt_scale.model.buffers import init_buffers
from loqt_scale.model.documents import attend
from loqt_scale.model.loss import end_in_loss
from loqt_scale.model.structure import build_meta_model
from tests.unit.model.test_models import family_config

LENGTH = 16


def model_of(family: str) -> Any:
    model = build_meta_model(family_config(family))
    model.to_empty(device="cpu")
    init_buffers(model, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_bits_are_those_of_the_masked_model(family: str) -> None:
    model = model_of(family)
    tokens = torch.randint(0, 67, (3, LENGTH))
    masked = model(input_ids=tokens).logits
    assert attend_packed(model, LENGTH) and attend_packed(model, LENGTH)
    assert torch.equal(model(input_ids=tokens, attention_mask=no_mask(tokens)).logits, masked)


def test_what_has_more_to_mask_keeps_its_mask() -> None:
    windowed = family_config("mistral")
    windowed.sliding_window = 8
    assert not attend_packed(build_meta_model(windowed), 16)
    assert attend_packed(build_meta_model(windowed), 8)
    assert not attend_packed(build_meta_model(family_config("gemma3_text")), 16)
    eager = build_meta_model(family_config("llama"), attn_implementation="eager")
    assert not attend_packed(eager, 16)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_whoever_calls_the_model_by_itself_has_their_mask_respected(family: str, apart: bool) -> None:
    """Batches padded on either side, sequences packed by positions, a cache of fixed size: as with `sdpa`."""
    model = model_of(family)
    model.eval()
    tokens = torch.randint(1, 67, (2, 12))
    left, right = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
    left[0, :5], right[1, 8:] = 0, 0
    calls: list[dict[str, Any]] = [{"attention_mask": mask} for mask in (left, right)]
    calls.append({"position_ids": torch.tensor([[*range(5), *range(7)]] * 2), "use_cache": False})
    told = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    kept: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    said = [[model(input_ids=tokens, **call).logits for call in calls]]
    said[0].extend(model.generate(tokens, attention_mask=left, **told, **how) for how in kept)
    end_in_loss(model)
    attend(model, DataConfig(seq_len=LENGTH, mask_documents=apart), separator=66)
    assert model.config._attn_implementation == PACKED
    said.append([model(input_ids=tokens, **call).logits for call in calls])
    said[1].extend(model.generate(tokens, attention_mask=left, **told, **how) for how in kept)
    for before, after in zip(*said, strict=True):
        assert torch.equal(before, after)
    assert torch.equal(said[0][-3], said[0][-1]) and not torch.equal(said[0][0], model(input_ids=tokens).logits)


@pytest.mark.parametrize("apart", [False, True])
def test_a_mask_beside_targets_is_refused(apart: bool) -> None:
    model = model_of("llama")
    end_in_loss(model)
    attend(model, DataConfig(seq_len=LENGTH, mask_documents=apart), separator=66)
    tokens = torch.randint(1, 67, (2, 12))
    assert torch.equal(model(tokens, targets=tokens), model(input_ids=tokens, targets=tokens))
    for name in ("attention_mask", "position_ids"):
        with pytest.raises(UserError, match=rf"{name} is given beside targets.*leave it out.*without targets"):
            model(input_ids=tokens, targets=tokens, **{name: torch.ones_like(tokens)})
