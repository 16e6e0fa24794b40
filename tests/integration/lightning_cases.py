"""The Lightning module of docs/library.md, and runs of it: on one process, and as one rank of several."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from loqt_scale import attach, convert_to_loqt
from tests.integration.trainer_cases import CONFIG, Progressions, has_trained, state_of, tiny_llama

STEPS, SAVED, PASSES, ROWS = 11, 5, 2, 4  # step 5, with which a loaded run goes on, ends in a merge and begins an epoch


class Module(LightningModule):
    """A model trained by LoQT."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = tiny_llama(seed)
        self.before: dict[str, Tensor] | None = self.state_dict()
        convert_to_loqt(self, CONFIG)
        self.merges: Any = None
        self.saved: dict[str, Any] | None = None
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def on_train_start(self) -> None:
        self.merges = attach(self.trainer.model, self.trainer.optimizers, CONFIG, initial_weights=self.before)
        self.before = None
        if self.saved is not None:
            self.merges.load_state_dict(self.saved)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.merges.prepare()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.merges.finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["merges"] = self.merges.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["merges"]


def fit(folder: str, *, seed: int = 0, ckpt: str | None = None, strategy: str = "auto", ranks: int = 1) -> Module:
    """Eleven steps of two passes over the progressions; with several ranks this is one of them. Every rank."""
    module = Module(seed)
    plugins: list[Any] = [TorchElasticEnvironment()] if ranks > 1 else []
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        plugins=plugins,
        max_steps=STEPS,
        accumulate_grad_batches=PASSES,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows, rank = Progressions(SAVED * PASSES * ROWS), int(os.environ.get("RANK", "0"))
    share = DistributedSampler(rows, num_replicas=ranks, rank=rank, shuffle=False)  # Lightning's own shuffles
    loader = DataLoader(rows, batch_size=ROWS // ranks, sampler=share)
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module


def ddp_rank(folder: str, *, seed: int = 0, ckpt: str | None = None) -> dict[str, Any]:
    """A run of two ranks: losses of all passes, what was found, a checksum of the end, whether all layers trained."""
    module = fit(folder, seed=seed, ckpt=ckpt, strategy="ddp", ranks=2)
    return {
        "losses": torch.stack(module.losses).tolist(),
        "found": module.merges.description,
        "end": [float(tensor.double().sum()) for tensor in state_of(module).values()],
        "trained": has_trained(module),
    }
