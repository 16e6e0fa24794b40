"""Vision, text and sequence-to-sequence models, trained with merges, in transformers' `pipeline` and `generate`.

The live converted model, its dense form and both kinds of saved folder answer alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

from loqt_scale import LoQTConfig, MergeConfig, attach, convert_to_loqt, save_merged, to_dense

WORDS = ["<pad>", "</s>", *(f"w{index}" for index in range(62))]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = LoQTConfig(rank=8, merge=MergeConfig(gap=2))
TEXT = "w3 w7 w11 w15"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def image_model() -> tuple[Any, dict[str, Tensor]]:
    config = ViTConfig(image_size=8, patch_size=4, num_labels=10, **SIZES)
    model = AutoModelForImageClassification.from_config(config)
    return model, {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.arange(4)}


def text_model(kind: str) -> tuple[Any, dict[str, Tensor]]:
    rows = torch.randint(2, 64, (4, 8))
    if kind == "t5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
        config = T5Config(vocab_size=64, decoder_start_token_id=0, feed_forward_proj="gated-gelu", **sizes)
        return AutoModelForSeq2SeqLM.from_config(config), {"input_ids": rows, "labels": rows}
    if kind == "bert":
        model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, num_labels=5, **SIZES))
        return model, {"input_ids": rows, "labels": torch.arange(4)}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **SIZES)), {"input_ids": rows, "labels": rows}


def classify_images(model: Any) -> Tensor:
    from PIL import Image

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    picture = Image.frombytes("RGB", (8, 8), bytes(range(192)))
    return scores(pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=10))


def classify_text(model: Any) -> Tensor:
    return scores(pipeline("text-classification", model=model, tokenizer=tokenizer())(TEXT, top_k=5))


def scores(answers: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([each["score"] for each in sorted(answers, key=lambda each: str(each["label"]))])


def write_text(model: Any) -> Tensor:
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    answer = pipe(TEXT, return_tensors=True, do_sample=False, max_new_tokens=6)
    return torch.tensor(answer[0]["generated_token_ids"]).float()


def translate(model: Any) -> Tensor:
    """The T5 pipeline is gone from transformers 5: `generate`, with the logits by which it chose."""
    model = AutoModelForSeq2SeqLM.from_pretrained(model) if isinstance(model, str) else model
    words = torch.tensor([[3, 7, 11, 15]])
    found = model.generate(words, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.cat([found.sequences[0].float(), torch.stack(found.logits).flatten()])


def trained(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    """After four steps and two merges."""
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = attach(model, optimizer, CONFIG, initial_weights=before)
    for _ in range(4):
        merges.prepare()
        model(**batch).loss.backward()
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        pytest.param(image_model, classify_images, id="vit"),
        pytest.param(lambda: text_model("bert"), classify_text, id="bert"),
        pytest.param(lambda: text_model("llama"), write_text, id="llama"),
        pytest.param(lambda: text_model("t5"), translate, id="t5"),
    ],
)
def test_pipelines_answer_alike_before_and_after(
    make: Callable[[], tuple[Any, dict[str, Tensor]]], answer: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batch = make()
    untrained = answer(model.eval())
    live = trained(model.train(), batch)
    dense, want = to_dense(live), answer(live)
    live.save_pretrained(tmp_path / "saved")
    save_merged(live, tmp_path / "merged")
    for other in (dense, str(tmp_path / "saved"), str(tmp_path / "merged")):
        torch.testing.assert_close(answer(other), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untrained[: len(want)], want[: len(untrained)], rtol=1e-3, atol=1e-3)
