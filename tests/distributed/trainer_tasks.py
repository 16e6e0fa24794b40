"""Trainer with LoQTCallback on ranks of the pool: plain, DDP, Accelerate's FSDP2 and DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from loqt_scale import LoQTCallback, LoQTConfig, MergeConfig, QuantizationConfig
from tests.integration.trainer_cases import Progressions, callback_of, losses, make_trainer, tiny_llama

MICRO_BATCHES = 4  # of four rows, in a step
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def config_of(scheme: str) -> LoQTConfig:
    """Merges at 0, 5 and 10 of eleven steps; packed by a scheme, or not (`none`)."""
    quantization = QuantizationConfig(weight=scheme, projection=scheme)
    return LoQTConfig(rank=8, merge=MergeConfig(gap=4), quantization=quantization)


def settings_of(spread: str) -> dict[str, Any]:
    """TrainingArguments of one way to spread a run."""
    if spread.startswith("zero"):
        stage = {"stage": int(spread[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        return {"deepspeed": {**ZERO, "zero_optimization": stage}, "use_cpu": False}
    if spread.startswith("fsdp"):
        fsdp = {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT" if spread.endswith("sharded") else "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": spread.endswith("lone"),
            "activation_checkpointing": spread.endswith("frugal"),
        }
        return {"fsdp": True, "fsdp_config": fsdp, "use_cpu": False}
    return {"ddp_backend": "gloo"} if spread == "ddp" else {}


def train(folder: str, spread: str, scheme: str, *, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """A whole run on this rank: losses of its steps, merge steps, the merged model's own loss."""
    with one_accelerator(spread):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        accumulate = {"gradient_accumulation_steps": MICRO_BATCHES // ranks}
        callback = LoQTCallback(config_of(scheme))
        settings = settings_of(spread) | accumulate | changes
        lost = spread.endswith("lone") and os.environ["RANK"] != "0"  # only rank 0 has loaded the model
        trainer = make_trainer(Path(folder), tiny_llama(seed=9 if lost else 0), callback, **settings)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(f"{folder}/end-{spread}")
        merges = callback_of(trainer).merges
        assert merges is not None
        steps = [report.step for report in callback_of(trainer).reports]
        found = {"losses": losses(trainer), "merges": steps, "how": getattr(merges, "description", "")}
        return found | _saved_loss(Path(folder) / f"end-{spread}", trainer)


def _saved_loss(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """The loss of the merged weights that were saved, on rank 0; nothing where Trainer saves shards only."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not (folder / "model.safetensors").exists() or not trainer.is_world_process_zero():
        return {}
    rows = Progressions(16, seed=3).rows
    model = tiny_llama(seed=5)  # not by from_pretrained, which partitions what it loads for an engine of stage 3
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return {"saved": model(input_ids=rows, labels=rows).loss.item()}


@contextmanager
def one_accelerator(spread: str) -> Iterator[None]:
    """Accelerate's singletons and variables are this run's own; CPUs pass for what it shards on.

    Accelerate 1 makes nothing of an FSDP or DeepSpeed configuration on CPUs: each rank would train alone. torch's
    `fully_shard` and DeepSpeed's engine work on them as on GPUs. So Accelerate is told of the backend and the kind of
    ranks that it would find on GPUs.
    """
    kept, prepared, made = dict(os.environ), PartialState._prepare_backend, AcceleratorState.__init__
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first run, and kept in /dev/shm
    if spread.startswith(("fsdp", "zero")):
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
        AcceleratorState.__init__ = _keeping_its_kind(made)
    try:
        yield
    finally:
        PartialState._prepare_backend, AcceleratorState.__init__ = prepared, made
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # and the groups that DeepSpeed remembers
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(kept)


def _keeping_its_kind(made: Any) -> Any:
    """`AcceleratorState.__init__` after which all of Accelerate knows that ranks are FSDP's."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.FSDP:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return init
