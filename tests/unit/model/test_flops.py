"""Counted FLOPs against torch's own counter, which sees the products of a real step on tensors without storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, MixtralConfig, PreTrainedConfig

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.functional.operator_flops import FORMULAS
from loqt_scale.model.build import design_model
from loqt_scale.model.flops import PassFlops, pass_flops
from loqt_scale.plan.activations import take_pass

SEQUENCES, VOCABULARY = 4, 320
FEW = {"data.seq_len": 16, "loqt.rank": 8}  # tokens: the low-rank product goes beside the base
MANY = {"data.seq_len": 128, "loqt.rank": 64}  # it goes into it
CASES = {
    "beside the base": FEW,
    "into the base": MANY,
    "P on the output side": {**FEW, "loqt.side": "output"},
    "P on the output side, into the base": {**MANY, "loqt.side": "output"},
    "full": {"method": "full"},
    "loss by chunks": {"method": "full", "model.loss_chunk_tokens": 32},
    "recomputed": {**MANY, "model.activation_checkpointing": "true"},
    "bfloat16": {**MANY, "model.dtype": "bfloat16"},
}


def counted_and_seen(**settings: Any) -> tuple[PassFlops, int]:
    """(our count, what torch's counter sees in one pass)."""
    given = {"model.preset": "llama_nano", "data.seq_len": 64, "train.micro_batch_size": SEQUENCES, **settings}
    config = parse_run_config([f"--{key}={value}" for key, value in given.items()])
    model = design_model(config, vocab_size=VOCABULARY).model
    recomputes = config.model.activation_checkpointing
    ours = pass_flops(model, sequences=SEQUENCES, seq_len=config.data.seq_len, recomputes=recomputes)
    counter: Any = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    with counter, sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's flash kernel
        take_pass(config, model, free=False)
    return ours, counter.get_total_flops()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_equal_what_torch_counts(settings: dict[str, Any]) -> None:
    ours, seen = counted_and_seen(**settings)
    assert ours.hardware == pytest.approx(seen, rel=0.001)


MIXTRAL = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)  # weights are transposed


@pytest.mark.parametrize("shape", [MIXTRAL, GPT2], ids=["experts", "transposed"])
def test_equal_what_torch_counts_of_other_architectures(shape: PreTrainedConfig, tmp_path: Path) -> None:
    shape.save_pretrained(tmp_path)
    ours, seen = counted_and_seen(**{"model.path": tmp_path, "loqt.rank": 16})
    assert ours.hardware == pytest.approx(seen, rel=0.001)
