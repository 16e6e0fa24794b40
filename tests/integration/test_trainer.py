"""LoQTCallback in transformers' Trainer, one process: against a loop of one's own, resumed, saved, misused."""

from __future__ import annotations

import copy
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, get_cosine_schedule_with_warmup
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import ModelOutput

from loqt_scale import LoQTCallback, MergeCoordinator, convert_to_loqt
from loqt_scale.errors import UserError
from loqt_scale.library.model_files import ResumeWithLoQTCallback, check_loaded, name_checkpoint
from tests.integration.trainer_cases import (
    CONFIG,
    STEPS,
    Progressions,
    arguments,
    callback_of,
    has_trained,
    losses,
    make_trainer,
    state_of,
    tiny_llama,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with two checkpoints and evaluations."""
    saves = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **saves)
    trainer.train()
    return trainer


def own_loop(trainer: Trainer) -> tuple[LlamaForCausalLM, list[float]]:
    """The same steps by hand: Trainer's data in its order, its groups, clipping and cosine."""
    model = tiny_llama()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    convert_to_loqt(model, CONFIG)
    decayed = trainer.get_decay_parameter_names(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if n in decayed], "weight_decay": 0.1}]
    groups.append({"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    merges = MergeCoordinator(model, optimizer, CONFIG, total_steps=STEPS, initial_weights=_Rows(weights))
    batches, found = iter(make_trainer(Path(trainer.args.output_dir) / "order").get_train_dataloader()), []
    for step in range(STEPS):
        merges.prepare(step)
        micro_batches = [next(batches) for _ in range(2)]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        merges.finish(step)
        optimizer.zero_grad()
        found.append(total)
    return model, found


class _Rows:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._weights[name][start:stop]


def test_a_loop_of_ones_own_does_the_same(whole: Trainer) -> None:
    model, found = own_loop(whole)
    assert losses(whole) == pytest.approx(found, abs=1e-6)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    assert callback_of(whole).merges.steps == [report.step for report in callback_of(whole).reports] == [0, 5, 10]
    assert has_trained(model)
    ours = state_of(whole.model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_goes_on_from_its_checkpoints_to_the_last_bit(whole: Trainer, tmp_path: Path) -> None:
    for step in (5, 10):  # a merge has just been made; the next step merges
        trainer = make_trainer(tmp_path, model=tiny_llama(seed=7))
        trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert losses(trainer)[step:] == losses(whole)[step:]
        ours = state_of(trainer.model)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in state_of(whole.model).items())


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=Progressions(4, seed=5).rows).logits


def test_saved_folders_hold_merged_weights(whole: Trainer, tmp_path: Path) -> None:
    whole.save_model(str(tmp_path / "end"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "end")), logits(whole.model))
    assert not any("codes" in key for key in load_file(tmp_path / "end" / "model.safetensors"))
    checkpoint = Path(whole.args.output_dir) / "checkpoint-5"
    model = make_trainer(tmp_path).model
    loaded = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(checkpoint)), logits(model))


def test_a_copy_saves_itself(whole: Trainer, tmp_path: Path) -> None:
    other = copy.deepcopy(whole.model)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(other))


def test_the_best_model_comes_back(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **saves, **best)
    trainer.train()
    assert trainer.state.best_global_step == 4
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.model.state_dict().items() if name in kept)
    assert sum("codes" in name for name in kept) == 28  # all packed tensors were among them
    trainer.save_model(str(tmp_path / "best"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "best")), logits(trainer.model))


def test_merged_weights_do_not_pass_for_a_checkpoint(whole: Trainer, tmp_path: Path) -> None:
    whole.save_model(str(tmp_path))
    whole.state.save_to_json(str(tmp_path / "trainer_state.json"))
    with pytest.raises(UserError, match="merged weights of 14 LoQT layers"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(tmp_path))


def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    Trainer(model=tiny_llama(), args=arguments(tmp_path, **saves), train_dataset=Progressions()).train()
    with pytest.raises(UserError, match="merged weights of 14 LoQT layers"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_an_optimizers_file_names_the_callback_that_it_needs(whole: Trainer) -> None:
    file = Path(whole.args.output_dir) / "checkpoint-5" / "optimizer.pt"
    assert torch.load(file, weights_only=True)["state"]  # a callback has allowed it
    torch.serialization.clear_safe_globals()  # as in a process without one
    try:
        with pytest.raises(UnpicklingError, match="ResumeWithLoQTCallback was not an allowed global"):
            torch.load(file, weights_only=True)
    finally:
        torch.serialization.add_safe_globals([ResumeWithLoQTCallback])


def test_a_checkpoint_may_be_of_several_files(tmp_path: Path) -> None:
    model = make_trainer(tmp_path).model
    name_checkpoint(model, "checkpoint-1")
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="16KB")
    other = make_trainer(tmp_path, model=tiny_llama(seed=7)).model
    load_sharded_checkpoint(other, tmp_path / "checkpoint-1", strict=False)
    check_loaded(other)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_reference_model_that_would_be_mixed_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.sync_ref_model = True  # TRL's DPOConfig and GRPOConfig have it
    with pytest.raises(UserError, match="sync_ref_model=False"):
        Trainer(model=tiny_llama(), args=args, train_dataset=Progressions(), callbacks=[LoQTCallback(CONFIG)])


def converted() -> LlamaForCausalLM:
    model = tiny_llama()
    convert_to_loqt(model, CONFIG)
    return model


def test_model_init_converts_or_is_told_to(tmp_path: Path) -> None:
    callbacks = [LoQTCallback(CONFIG)]
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(UserError, match="def model_init"):
        Trainer(model_init=lambda: tiny_llama(), args=args, train_dataset=Progressions(), callbacks=callbacks).train()


def test_a_model_of_model_init_goes_on_and_trains_anew(tmp_path: Path) -> None:
    """Each `train` makes another model, of which the callback has not heard before."""

    def trainer() -> Trainer:
        callbacks = [LoQTCallback(CONFIG)]
        args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
        return Trainer(model_init=converted, args=args, train_dataset=Progressions(), callbacks=callbacks)

    whole, again = trainer(), trainer()
    whole.train()
    found = losses(whole)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == found and has_trained(again.model)
    ours = state_of(again.model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in state_of(whole.model).items())
    whole.train()
    assert losses(whole) == found


def test_a_callback_that_was_added_later_is_told_where_it_belongs(tmp_path: Path) -> None:
    trainer = Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=Progressions())
    trainer.add_callback(LoQTCallback(CONFIG))
    with pytest.raises(UserError, match=r"callbacks=\[LoQTCallback\(config\)\]"):
        trainer.train()


def test_an_optimizer_from_before_the_conversion_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizers = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(UserError, match="convert the model before you make the optimizer"):
        Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=Progressions(),
            optimizers=optimizers,
            callbacks=[LoQTCallback(CONFIG)],
        )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])  # the latter skips unseen
def test_a_merge_step_that_the_scaler_skips_is_put_off(optim: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=0.0, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.model.register_forward_hook(lambda *call: _overflow(trainer, call[-1]))
    trainer.train()
    assert [report.step for report in callback_of(trainer).reports] == [1, 6, 10]
    assert all(tensor.isfinite().all() for tensor in state_of(trainer.model).values())
    assert losses(trainer)[-1] < 3.7 and has_trained(trainer.model)


def _overflow(trainer: Trainer, output: ModelOutput) -> None:
    if trainer.state.global_step in (0, 5):  # two merge steps
        output["loss"] = output["loss"] * float("inf")


def test_a_smaller_batch_after_the_memory_was_full(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, max_steps=6)
    trainer.model.register_forward_pre_hook(_full_memory, with_kwargs=True)
    trainer.train()
    assert trainer._train_batch_size < 4
    assert [report.step for report in callback_of(trainer).reports] == [0, 5]
    assert has_trained(trainer.model) and len(losses(trainer)) == 6


def _full_memory(_model: object, _args: object, kwargs: dict[str, Tensor]) -> None:
    if len(kwargs["input_ids"]) > 3:
        raise RuntimeError("CUDA out of memory.")


def test_epochs_with_a_remainder_and_checkpointed_activations(tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 5, "learning_rate": 2e-2}
    plain, frugal = (
        make_trainer(tmp_path, **epochs, activation_checkpointing=checkpointed) for checkpointed in (False, True)
    )
    plain.train()
    frugal.train()
    assert callback_of(plain).merges.steps == [0, 5] and len(losses(plain)) == 10
    assert losses(plain) == losses(frugal)


def test_a_restored_callback_is_this_one(whole: Trainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-10")
    assert losses(trainer) == losses(whole)
    assert callback_of(trainer).config == CONFIG
