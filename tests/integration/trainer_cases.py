"""A tiny language model, data that can be learned, and Trainers around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loqt_scale import LoQTCallback, LoQTConfig, MergeConfig
from loqt_scale.layers import loqt_layers

CONFIG = LoQTConfig(rank=8, merge=MergeConfig(gap=4))
STEPS, TOKENS = 11, 16


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Two layers of width 32."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **{**shape, **settings}))


class Progressions(Dataset[dict[str, Tensor]]):
    """Arithmetic progressions modulo 64."""

    def __init__(self, rows: int = 96, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 64, (rows, 1), generator=generator)
        stride = torch.randint(1, 4, (rows, 1), generator=generator)
        self.rows = (start + stride * torch.arange(TOKENS)) % 64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Two micro-batches of four rows a step, clipping, a cosine, losses of every step."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 1,
        "data_seed": 1,
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
        "weight_decay": 0.1,
    }
    return TrainingArguments(**(settings | changes))


def make_trainer(
    folder: Path, model: nn.Module | None = None, callback: LoQTCallback | None = None, **changes: Any
) -> Trainer:
    """A Trainer with the callback, over the progressions."""
    return Trainer(
        model=model or tiny_llama(),
        args=arguments(folder, **changes),
        train_dataset=Progressions(),
        eval_dataset=Progressions(8, seed=1),
        callbacks=[callback or LoQTCallback(CONFIG)],
    )


def callback_of(trainer: Trainer) -> LoQTCallback:
    """Trainer's LoQTCallback."""
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, LoQTCallback))


def losses(trainer: Trainer) -> list[float]:
    """Of all steps so far."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all its tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def has_trained(model: nn.Module) -> bool:
    """Whether every layer has a P and a B."""
    return all(bool(layer.projection.dense().any() and layer.factor.any()) for _, layer in loqt_layers(model))
