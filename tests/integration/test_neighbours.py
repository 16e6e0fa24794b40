"""What people have around a model: sequence-to-sequence Trainers, two towers, torch.compile, checkpointing, a hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    CLIPModel,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    trainer,
)

from loqt_scale import LoQTCallback, attach, convert_to_loqt
from tests.integration.trainer_cases import CONFIG, Progressions, arguments, has_trained, make_trainer, tiny_llama

STEPS = 6


class Pairs(Progressions):
    """The end of each progression from its beginning."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index][:8], "labels": self.rows[index][8:]}


def test_seq2seq_that_generates_to_evaluate_stops_early_with_its_best_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    every: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "greater_is_better": True}
    settings = arguments(tmp_path, max_steps=40, **every, **best).to_dict()
    scores = iter([0.1, 0.3, 0.2, 0.2, 0.2, 0.2])
    generated = []

    def score(found: Any) -> dict[str, float]:
        generated.append(found.predictions.shape)
        return {"score": next(scores)}

    own = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**settings | {"predict_with_generate": True, "generation_max_length": 8}),
        train_dataset=Pairs(),
        eval_dataset=Pairs(4, seed=1),
        compute_metrics=score,
        callbacks=[LoQTCallback(CONFIG), EarlyStoppingCallback(2)],
    )
    own.train()
    assert own.state.global_step == 8 and own.state.best_model_checkpoint.endswith("checkpoint-4")
    assert has_trained(model) and generated[0][0] == 4
    own.save_model(str(tmp_path / "best"))
    ids, loaded = Pairs(2, seed=2).rows[:, :8], AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "best")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    stored = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(loaded, ids), logits(stored, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    return found


def test_clips_two_towers_train_by_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63, "bos_token_id": 62}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    pictures = torch.randn(16, 3, 16, 16)

    def batch(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "pixel_values": pictures[ids[:, 0] % 16], "return_loss": True}

    args = arguments(tmp_path, remove_unused_columns=False, max_steps=6)
    own = Trainer(model, args, data_collator=batch, train_dataset=Progressions(), callbacks=[LoQTCallback(CONFIG)])
    own.train()
    assert has_trained(model)
    own.save_model(str(tmp_path / "saved"))
    given = batch([Progressions()[index] for index in range(4)])
    with torch.no_grad():
        want = model.eval()(**given).logits_per_image
        got = CLIPModel.from_pretrained(tmp_path / "saved").eval()(**given).logits_per_image
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def own_losses(around: Callable[[LlamaForCausalLM], nn.Module]) -> list[float]:
    """Of a loop of one's own; `around` gets the converted model."""
    model, rows = tiny_llama(), Progressions(4 * STEPS).rows
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    called, losses = around(model.train()), []
    merges = attach(called, optimizer, CONFIG, initial_weights=before)
    for ids in rows.split(4):
        merges.prepare()
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def checkpointing(reentrant: bool) -> Callable[[LlamaForCausalLM], nn.Module]:
    def enable(model: LlamaForCausalLM) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return enable


def test_compiled_models_and_recomputed_activations_change_no_bit() -> None:
    expected = own_losses(lambda model: model)
    for reentrant in (False, True):
        assert own_losses(checkpointing(reentrant)) == expected
    torch.compiler.reset()
    assert own_losses(lambda model: torch.compile(model, backend="eager", fullgraph=True)) == expected


def test_what_is_pushed_to_a_hub_is_merged_and_a_pushed_checkpoint_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the upload: a hub that copies the folders."""

    class Hub:
        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": "me/model", "url": ""})()

        def upload_folder(self, *, folder_path: str, path_in_repo: str = "model", **kwargs: Any) -> Any:
            shutil.copytree(folder_path, tmp_path / "hub" / path_in_repo, dirs_exist_ok=True)
            done = {"is_done": lambda self: True, "result": lambda self: "", "exception": lambda self: None}
            return type("Job", (), {**done, "done": lambda self: True})()

    monkeypatch.setattr(trainer, "hf_api", Hub)
    pushing = {"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": "checkpoint"}
    whole = make_trainer(tmp_path / "run", **pushing, save_strategy="steps", save_steps=5, save_total_limit=1)
    whole.train(), whole.push_to_hub()
    ids = Progressions(2, seed=3).rows
    with torch.no_grad():
        want = whole.model.eval()(input_ids=ids).logits
        got = LlamaForCausalLM.from_pretrained(tmp_path / "hub" / "model").eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    longer = make_trainer(tmp_path / "again", tiny_llama(seed=3), max_steps=13)
    longer.train(resume_from_checkpoint=str(tmp_path / "hub" / "last-checkpoint"))
    assert longer.state.global_step == 13 and longer.state.log_history[:11] == whole.state.log_history[:11]
