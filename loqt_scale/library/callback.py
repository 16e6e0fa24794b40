"""`LoQTCallback`: LoQT in transformers' Trainer, and in every class that is derived from it (TRL's, say).

Trainer's event       what happens
on_init_end           the model is converted, before there is an optimizer or a wrapper
on_train_begin        Trainer has wrapped both, and has loaded its checkpoint: merges are attached to them
on_step_begin         `prepare`: before the first forward pass of a step
on_optimizer_step     `finish`: after the update, before gradients are zeroed; a skipped step's merge is put off
state()               what Trainer writes of us into each checkpoint's trainer_state.json
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from loqt_scale.config import LoQTConfig, MergeConfig, QuantizationConfig, SubspaceConfig
from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers import convert_to_loqt, loqt_layers
from loqt_scale.library.attach import Given, attach
from loqt_scale.library.first_weights import FirstWeights
from loqt_scale.library.model_files import (
    check_loaded,
    forget_loaded,
    mark_optimizer_file,
    name_checkpoint,
    write_checkpoints,
)
from loqt_scale.merge import MergeCoordinator, MergeReport
from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies import engine_of, packed_bytes_may_be_sharded, replicas, unwrapped_optimizers
from loqt_scale.strategies.whole import is_in_fsdp

CONVERT_FIRST = """convert the model before you make the optimizer:
    convert_to_loqt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=...)
    Trainer(model, args, ..., optimizers=(optimizer, scheduler), callbacks=[LoQTCallback(config)])"""
CONVERT_IN_INIT = """Trainer makes a new model by model_init at every train(), and it is not converted; do so there:
    def model_init():
        model = ...
        convert_to_loqt(model, config)
        return model"""

GIVEN_LATE = (
    "trainer.add_callback(LoQTCallback(...)) is too late to convert the model: give it to the Trainer when it is made: "
    "Trainer(..., callbacks=[LoQTCallback(config)])"
)


class LoQTCallback(TrainerCallback, ExportableState):
    """Trains a Trainer's model by LoQT: `Trainer(model, args, ..., callbacks=[LoQTCallback(config)])`.

    The model is converted when the Trainer is made, unless it was before. Accumulation, clipping, schedules, several
    ranks, checkpoints, the best model and evaluations are Trainer's. `save_model` and `save_pretrained` write merged
    weights, which `from_pretrained` reads; the checkpoint folders hold the packed tensors, too, so that
    `train(resume_from_checkpoint=...)` goes on to the last bit.

    Args:
        config: The method's settings; a mapping of them, as a checkpoint holds it, too.
        seed: Seed of the sketches.
        initial_weights: As `attach` takes them, of a model that was converted before; the callback keeps those of a
            model that it converts, in host memory, until the first merge.

    Attributes:
        merges: What merges, from `on_train_begin` on.
        reports: Of all merges since then.
    """

    def __init__(self, config: LoQTConfig | Mapping[str, Any], *, seed: int = 0, initial_weights: Given = None) -> None:
        require_kind(config, (LoQTConfig, Mapping), "the config", "give a LoQTConfig: LoQTConfig(rank=128)")
        self.config = config if isinstance(config, LoQTConfig) else _config_of(config)
        self.seed, self.initial_weights = seed, initial_weights
        self.merges: MergeCoordinator | None = None
        self.reports: list[MergeReport] = []
        self._passes: int | None = None
        self._at_start: dict[str, Any] = {}  # the merges' state before the first step of this `train`
        self._before: dict[str, Any] | None = None  # what of it is another before this step; None: it is being changed
        self._has_begun = False  # whether Trainer had this callback when it was made
        self._in_step = False  # also after one that ran out of memory, which Trainer may try again
        self._bytes = ExitStack()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Converts the model.

        Raises:
            UserError: There is an optimizer already, or Trainer would spread the model as merges do not know.
        """
        self._has_begun = True
        _refuse(args, model)
        if args.fsdp:
            self._bytes.enter_context(packed_bytes_may_be_sharded())
        if not _is_converted(model):
            if optimizer is not None:
                raise UserError(f"the optimizer was made before the model was converted; {CONVERT_FIRST}")
            before = dict(model.named_parameters())
            convert_to_loqt(model, self.config)
            self.initial_weights = FirstWeights(before, model)
        write_checkpoints(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        """Attaches merges to what Trainer has made of model and optimizer, at the step where its checkpoint ended.

        Raises:
            UserError: The model was not converted, or the checkpoint is of a run without this callback.
        """
        if not _is_converted(model):
            raise UserError(CONVERT_IN_INIT if self._has_begun else GIVEN_LATE)
        write_checkpoints(model)  # it may be another one than at the start (model_init)
        self._bytes.close()
        check_loaded(model)
        self.reports.clear()
        self._passes = _backward_passes(args, train_dataloader)
        self.merges = self._attach(args, model, optimizer, state)
        self.merges.expect_state(merged=False)  # at step 0 there is none: train() may come again
        if state.global_step > 0:
            self.merges.load_state_dict(self._stored(state))
        self._at_start = self.merges.state_dict()
        name_checkpoint(model, f"checkpoint-{state.global_step}")  # on a signal, before the first step
        if engine_of(model) is None and not is_in_fsdp(model):  # their files are read by names of parameters
            for inner in unwrapped_optimizers(optimizer):
                mark_optimizer_file(inner)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the forward passes of a step."""
        assert self.merges is not None
        self._in_step, self._before = True, self.merges.progress()
        self.merges.prepare(state.global_step, backward_passes=self._passes)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """After the update: merges, or puts the merge of a step that was skipped off to the next."""
        assert self.merges is not None
        self._before, step = None, state.global_step
        if not getattr(optimizer, "step_was_skipped", False):
            self._merge(step)
        elif self.merges.is_merge_step(step):
            self.merges.postpone(step)
        self._in_step = False  # from here on: whoever saves at the step's end may be asked before this callback
        name_checkpoint(model, f"checkpoint-{step + 1}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """What is saved from now on is no checkpoint."""
        name_checkpoint(model, "")
        forget_loaded(model)

    def state(self) -> dict[str, Any]:
        """What Trainer keeps of this callback: its arguments, and the merges' position; plain data."""
        merges = None
        if self.merges is not None:  # up to the update a step's checkpoint (on a signal) is that of its beginning
            merges = self._state_in_step() if self._in_step else self.merges.state_dict()
        return {"args": {"config": asdict(self.config), "seed": self.seed}, "attributes": {"_merges_state": merges}}

    def _merge(self, step: int) -> None:
        assert self.merges is not None
        report = self.merges.finish(step)
        if report is not None:
            self.reports.append(report)
            if isinstance(self.initial_weights, FirstWeights) and not report.kept:
                self.initial_weights.release()

    def _attach(
        self, args: TrainingArguments, model: nn.Module, optimizer: Any, state: TrainerState
    ) -> MergeCoordinator:
        engine = engine_of(model)
        replicated = args.world_size > 1 and engine is None and not is_in_fsdp(model)
        return attach(
            engine or model,
            optimizer,
            self.config,
            total_steps=state.max_steps,
            seed=self.seed,
            initial_weights=self.initial_weights if state.global_step == 0 else None,
            editing=replicas(args.device) if replicated else None,  # Trainer hands over what is inside of its DDP
        )

    def _state_in_step(self) -> dict[str, Any] | None:
        return None if self._before is None else {**self._at_start, **self._before}

    def _stored(self, state: TrainerState) -> dict[str, Any]:
        """What `state` wrote into the checkpoint from which this run goes on, which may become longer."""
        mine = (state.stateful_callbacks or {}).get(type(self).__name__)
        stored = mine["attributes"]["_merges_state"] if isinstance(mine, dict) else None
        if stored is None:
            raise UserError(
                f"the checkpoint of step {state.global_step} was written by a run without {type(self).__name__}, or in "
                "the middle of an update; load its weights by from_pretrained and begin a new run with them"
            )
        return {**stored, "settings": {**stored["settings"], "total_steps": state.max_steps}}


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    """Refuses what Trainer would do to the model and merges do not know."""
    if args.n_gpu > 1:
        raise UserError(
            f"Trainer would spread the model over {args.n_gpu} GPUs by DataParallel, which merges do not know; start "
            f"the script by: torchrun --standalone --nproc-per-node {args.n_gpu} script.py"
        )
    if args.fsdp and int(args.fsdp_config.get("version", 2)) == 1:
        raise UserError(
            "fsdp_config asks for FSDP1, which flattens parameters, so that codes, scales and factors could not be "
            'told apart; write fsdp_config={"version": 2}'
        )
    if getattr(args, "sync_ref_model", False):
        raise UserError(
            "sync_ref_model would mix this model's packed tensors into the reference model's weights (TRL's "
            "SyncRefModelCallback); write sync_ref_model=False"
        )
    if getattr(args, "precompute_ref_log_probs", False):
        warn_caller(
            "LoQT: unless you give ref_model=..., precompute_ref_log_probs=True takes the rounded weights for the "
            "reference model; give it the model from before the conversion",
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "DeepSpeed has partitioned the model as it was loaded (ZeRO stage 3), so its weights cannot be converted; "
            "load the model before you make TrainingArguments(deepspeed=...)"
        )


def _is_converted(model: nn.Module) -> bool:
    return next(loqt_layers(model), None) is not None


def _config_of(settings: Mapping[str, Any]) -> LoQTConfig:
    groups = {"subspace": SubspaceConfig, "merge": MergeConfig, "quantization": QuantizationConfig}
    plain = {key: value for key, value in settings.items() if key not in groups}
    return LoQTConfig(**plain, **{key: kind(**settings[key]) for key, kind in groups.items() if key in settings})


def _backward_passes(args: TrainingArguments, loader: DataLoader[Any]) -> int | None:
    """Backward passes of every step; None: the last step of an epoch has fewer, or nobody knows."""
    passes = int(args.gradient_accumulation_steps)
    try:
        return passes if len(loader) % passes == 0 else None
    except TypeError:  # a stream without a length
        return 1 if passes == 1 else None
