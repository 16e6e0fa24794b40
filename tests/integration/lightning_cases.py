"""The Lightning module of docs/library.md, and runs of it: on one process, and as one rank of several."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricsDDP
from lightning.fabric.strategies import DeepSpeedStrategy as FabricsDeepSpeed
from lightning.fabric.strategies import ModelParallelStrategy as FabricsModelParallel
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from loqt_scale import attach, convert_to_loqt, to_dense
from tests.integration.trainer_cases import CONFIG, Progressions, state_of, tiny_llama

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


class Sharded(Module):
    """The same for ModelParallelStrategy, which leaves `fully_shard` to the module."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's own, without its wish for GPUs."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # its index is what DeepSpeed is given

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo serves, without a compiler
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy_of(how: str, ranks: int) -> str | Strategy:
    """Lightning's strategy: auto, ddp, fsdp2, zero1, zero2 or zero3."""
    if how == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    return DeepSpeedOnCPU(stage=int(how[-1])) if how.startswith("zero") else how


def fit(folder: str, *, seed: int = 0, ckpt: str | None = None, how: str = "auto", ranks: int = 1) -> Module:
    """Eleven steps of two passes over the progressions; with several ranks this is one of them. Every rank."""
    module = (Sharded if how == "fsdp2" else Module)(seed)
    plugins: list[Any] = [TorchElasticEnvironment()] if ranks > 1 else []
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy_of(how, ranks),
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


class FabricsDeepSpeedOnCPU(FabricsDeepSpeed):
    """Fabric's own, without its wish for GPUs."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        FabricsDDP.setup_environment(self)

    def _setup_distributed(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        self._format_config()


def _shard(module: Any, mesh: Any) -> Any:
    for block in module.model.layers:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def _fabric(how: str, ranks: int) -> Fabric:
    """Fabric on this process, or on one rank of several: auto, ddp, fsdp2, zero1, zero2 or zero3."""
    strategy: Any = how
    if how == "fsdp2":
        strategy = FabricsModelParallel(parallelize_fn=_shard, data_parallel_size=ranks, tensor_parallel_size=1)
    elif how.startswith("zero"):
        strategy = FabricsDeepSpeedOnCPU(stage=int(how[-1]))
    fabric = Fabric(
        accelerator="cpu", devices=ranks, strategy=strategy, plugins=[TorchElasticEnvironment()][: ranks - 1]
    )
    if ranks > 1:
        fabric.launch()
    return fabric


def fabric_losses(file: str, *, first: int = 0, last: int = STEPS, how: str = "auto", ranks: int = 1) -> list[float]:
    """The same steps by Fabric (an engine's of one pass each), saved before step `SAVED`, or gone on with from there.

    Means over ranks. Every rank.
    """
    fabric, passes = _fabric(how, ranks), 1 if how.startswith("zero") else PASSES
    model, rows, found = tiny_llama(seed=first), Progressions(SAVED * PASSES * ROWS), []
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    if how == "fsdp2":  # the optimizer comes after the sharding
        model = fabric.setup_module(model)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = (
        (model, fabric.setup_optimizers(optimizer)) if how == "fsdp2" else fabric.setup(model, optimizer)
    )
    merges = attach(wrapped, optimizer, CONFIG, initial_weights=None if first else before)
    everything = {"model": wrapped, "optimizer": optimizer, "merges": merges}
    if first:
        fabric.load(file, everything)
        if how == "fsdp2":  # the saved state lies in the place of its owner
            merges.load_state_dict(everything["merges"])
    batches = list(torch.utils.data.DataLoader(rows, batch_size=ROWS))
    for step in range(first, last):
        if step == SAVED and not first:
            fabric.save(file, everything)
        merges.prepare()
        for index in range(passes):
            batch = batches[(step * PASSES + index) % len(batches)]
            loss = wrapped(**{key: value[fabric.global_rank :: ranks] for key, value in batch.items()}).loss
            fabric.backward(loss / passes)
            found.append(float(fabric.all_reduce(loss.detach(), reduce_op="mean")))
        if not how.startswith("zero"):
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
    if how.startswith("zero"):
        close(wrapped._forward_module)
    return found


def close(engine: Any) -> None:
    """Ends an engine and DeepSpeed's own view of the process group, for the next task of this process."""
    import deepspeed

    engine.destroy()
    deepspeed.comm.destroy_process_group()


def rank_of_two(folder: str, *, how: str, seed: int = 0, ckpt: str | None = None) -> dict[str, Any]:
    """A run of two ranks: losses of all passes, what was found, a checksum of the end, whether all layers trained."""
    module = fit(folder, seed=seed, ckpt=ckpt, how=how, ranks=2)
    engine = module.trainer.model
    dense = to_dense(engine)
    if how.startswith("zero"):
        close(engine)
    return {
        "losses": torch.stack(module.losses).tolist(),
        "found": module.merges.description,
        "end": [float(tensor.double().sum()) for tensor in state_of(dense).values()],
    }
