"""Documents that do not see one another: a packed sequence gives what its documents give one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import CONFIG_MAPPING

from loqt_scale.config import DataConfig, LoQTConfig, ModelConfig, RunConfig
from loqt_scale.data.packing import IGNORED_LABEL, evaluation_windows, join_documents
from loqt_scale.errors import UserError
from loqt_scale.model import attention, packed_attention
from loqt_scale.model.attention import ARCHITECTURES, PACKED
from loqt_scale.model.build import design_model, recompute_blocks
from loqt_scale.model.documents import attend, check_documents
from loqt_scale.model.loss import end_in_loss
from loqt_scale.model.structure import decoder_blocks
from tests.unit.model.test_loss import model_of

END, LENGTH = 66, 16
# empty documents, one that is longer than a sequence, one token between two ends
DOCUMENTS = [[1, 2, 3], [], [], [4], list(range(5, 45)), [50, 51, 52, 53], [], [60, 61, 62, 63, 64]]
DATA = DataConfig(seq_len=LENGTH, mask_documents=True)
FAMILIES = (*ARCHITECTURES, "gpt2", "gemma2", "gemma3_text", "gpt_neox", "mixtral")
SINGLE, PARTLY_SINGLE = ("mixtral",), ("gemma2", "gemma3_text")  # know float32 only; have softmax and norms in it
WINDOWED = {"sliding_window": 4}


@pytest.fixture(autouse=True)
def some_documents_are_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of these documents some are attended to alone, some in groups."""
    monkeypatch.setattr(packed_attention, "GROUP", 8)
    packed_attention.grouped.cache_clear()
    yield
    packed_attention.grouped.cache_clear()


def packed() -> tuple[Tensor, Tensor]:
    """All of `DOCUMENTS` as `data` packs them for an evaluation, whose last sequence is padded."""
    inputs, labels = evaluation_windows(join_documents(DOCUMENTS, END), LENGTH, 99, END)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def pieces(tokens: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each document, or what there is of it in a sequence, with its labels, found by going through the tokens."""
    found: list[tuple[list[int], list[int]]] = []
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        for place, (token, label) in enumerate(zip(row, row_labels, strict=True)):
            if place == 0 or token == END:
                found.append(([], []))
            found[-1][0].append(token)
            found[-1][1].append(label)
    return [(torch.tensor([ids]), torch.tensor([targets])) for ids, targets in found]


def exact_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """In float64, which the loss that a model ends in is not."""
    made = model.forward.made(tokens) if model.forward.made else {}
    logits = model(input_ids=tokens, use_cache=False, **made).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def loss_and_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, exact: bool = False) -> list[Tensor]:
    model.zero_grad()
    taken = [exact_loss(model, *batch) if exact else model(input_ids=batch[0], targets=batch[1]) for batch in batches]
    total = torch.stack(taken).sum()
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:eager attention is used")
@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, {}) for kind in FAMILIES), ("mistral", WINDOWED), ("gemma3_text", WINDOWED)]
)
def test_a_packed_sequence_gives_what_its_documents_give_alone(kind: str, more: dict[str, Any]) -> None:
    model = model_of(kind, **more)
    if kind not in SINGLE:
        model.double()
    rounding = 1e-6 if kind in (*SINGLE, *PARTLY_SINGLE) else 1e-13
    end_in_loss(model, chunk=5)
    tokens, labels = packed()
    alone = loss_and_gradients(model, pieces(tokens, labels), exact=True)
    together = exact_loss(model, tokens, labels)  # they see one another
    attend(model, DATA, separator=END)
    config: Any = model.config
    assert (config._attn_implementation == PACKED) == (kind in ARCHITECTURES and not more)
    apart = loss_and_gradients(model, [(tokens, labels)], exact=True)
    scale = max(float(gradient.abs().max()) for gradient in alone)
    torch.testing.assert_close(apart, alone, rtol=100 * rounding, atol=rounding * scale)
    assert abs(together - alone[0]) > 1e-6 * alone[0]
    by_chunks = loss_and_gradients(model, [(tokens, labels)])  # logits in float32
    torch.testing.assert_close(by_chunks, alone, rtol=1e-5, atol=1e-6 * scale, check_dtype=False)
    assert int((labels != IGNORED_LABEL).sum()) == sum(map(len, DOCUMENTS)) + len(DOCUMENTS) - 1  # all but the first


def test_recomputed_compiled_and_in_bfloat16_it_is_the_same() -> None:
    tokens, labels = packed()
    model = model_of("llama").train()
    end_in_loss(model)
    attend(model, DATA, separator=END)
    expected = loss_and_gradients(model, [(tokens, labels)])
    recompute_blocks(model)
    compiled = CompileCounter()
    for _, block in decoder_blocks(model):
        block.compile(backend=compiled)
    torch.testing.assert_close(loss_and_gradients(model, [(tokens, labels)]), expected)
    graphs = compiled.frame_count
    for shift in range(1, 4):  # other borders
        loss_and_gradients(model, [(tokens.roll(shift, dims=1), labels)])
    assert graphs > 0 and compiled.frame_count == graphs, "documents of other lengths are compiled anew"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens, targets=labels)
    assert loss.item() == pytest.approx(expected[0].item(), rel=0.02)


def test_whoever_calls_the_model_by_itself_may_generate_and_needs_no_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = model_of("llama").eval()
    prompt = torch.tensor([[1, 2, END, 3]])
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    end_in_loss(model)
    attend(model, DATA, separator=END)
    assert model.config._attn_implementation == PACKED
    for cache in (True, False):  # goes on from keys of before
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cache), expected)
    monkeypatch.setattr(attention, "attend_by_document", None)  # is for CPUs, and knows no dropout
    dropping = model_of("llama", attention_dropout=0.5).train()
    end_in_loss(dropping)
    attend(dropping, DATA, separator=END)
    assert not torch.equal(dropping(input_ids=prompt).logits, dropping(input_ids=prompt).logits)
    model.to("meta")
    assert model(input_ids=prompt.to("meta")).logits.shape[:2] == (1, 4)


def test_models_that_cannot_keep_documents_apart_are_refused(tmp_path: Path) -> None:
    refused = {"opt": {}, "bloom": {}, "mpt": {}, "mamba": {}, "rwkv": {}, "gpt_oss": {}}
    for kind, fields in refused.items():
        with pytest.raises(UserError, match=rf"a {kind} model cannot keep documents apart.*write data\.mask_documents"):
            check_documents(DATA, CONFIG_MAPPING[kind](**fields))
        check_documents(DataConfig(), CONFIG_MAPPING[kind](**fields))
    for kind in ("llama", "falcon", "gptj", "qwen3_moe", "deepseek_v3", "gemma2"):
        check_documents(DATA, CONFIG_MAPPING[kind]())
    shape = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_head": 2, "n_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    config = RunConfig(model=ModelConfig(path=str(tmp_path)), data=DATA, loqt=LoQTConfig(rank=4))
    with pytest.raises(UserError, match=r"a bloom model cannot"):
        design_model(config, vocab_size=64)
