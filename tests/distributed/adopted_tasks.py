"""Training loops of other people, which spread a small model over ranks their own way, beside one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, convert_to_loqt, muon

STEPS, SEQUENCES, LENGTH, VOCABULARY = 12, 8, 16, 64


class Block(nn.Module):
    """A residual block whose sizes neither fill NF4 blocks by single rows nor divide by two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 86), nn.Linear(86, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Small(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 48)
        self.blocks = nn.Sequential(Block(), Block())
        self.lm_head = nn.Linear(48, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.embed(tokens)))


def config(scheme: str, **merge: Any) -> LoQTConfig:
    """Merges at 0, 5, 10."""
    quantization = QuantizationConfig(weight=scheme, projection=scheme)  # type: ignore[arg-type]
    return LoQTConfig(rank=8, merge=MergeConfig(gap=5, schedule="constant", **merge), quantization=quantization)


def batch(step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """A rank's sequences, arithmetic progressions: (N, LENGTH)."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCABULARY, (SEQUENCES, 1), generator=generator)
    return ((first + 3 * torch.arange(LENGTH)) % VOCABULARY)[rank::world_size]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss."""
    return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def converted(scheme: str, **merge: Any) -> tuple[nn.Module, dict[str, Tensor], LoQTConfig]:
    """A converted model, its weights from before, its settings."""
    torch.manual_seed(0)
    model, settings = Small(), config(scheme, **merge)
    before = model.state_dict()
    convert_to_loqt(model, settings)
    return model, before, settings


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def train_own(how: str, scheme: str, *, micro: int = 1, counted: bool = False, by_muon: bool = False) -> dict[str, Any]:
    """Losses, kind that was found and merges of somebody's own loop. Every rank.

    Args:
        how: single, ddp, fsdp, hsdp (2 x 2), zero1, zero2 or zero3.
        scheme: How W and P are stored.
        micro: Passes of a step.
        counted: Whether the passes are told beforehand.
        by_muon: Our Muon, not torch's AdamW.
    """
    alone = how == "single"
    if not alone:
        _join(how)
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    model, before, settings = converted(scheme)
    wrapped, optimizer = _spread(how, model, micro, by_muon)
    merges = MergeCoordinator(wrapped, optimizer, settings, initial_weights=before)
    losses, reports = [], []
    for step in range(STEPS):
        merges.prepare(backward_passes=micro if counted else None)
        total = torch.zeros(())
        for piece in batch(step, rank, world_size).chunk(micro):
            loss = loss_of(wrapped, piece)
            total += loss.detach() / micro
            if how.startswith("zero"):
                wrapped.backward(loss)
                wrapped.step()
            else:
                (loss / micro).backward()
        if not how.startswith("zero"):
            optimizer.step()
        reports.append(merges.finish())
        optimizer.zero_grad()
        if not alone:
            dist.all_reduce(total)
        losses.append(float(total) / world_size)
    if how.startswith("zero"):
        _close(wrapped)
    means = [report.means() for report in reports if report is not None]
    return {"losses": losses, "found": merges.description, "merges": means, "steps": merges.steps}


def _join(how: str) -> None:
    if how.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    else:
        dist.init_process_group("gloo")


def _close(engine: Any) -> None:
    """Ends an engine and DeepSpeed's own view of the process group, for the next task of this process."""
    import deepspeed

    engine.destroy()
    deepspeed.comm.destroy_process_group()


def _spread(how: str, model: nn.Module, micro: int, by_muon: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how in ("fsdp", "hsdp"):
        names = ("replicate", "shard") if how == "hsdp" else ("dp",)
        mesh = init_device_mesh("cpu", (2, 2) if how == "hsdp" else (dist.get_world_size(),), mesh_dim_names=names)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained(model), lr=5e-3, eps=1e-6)
    if by_muon:
        optimizer = muon(model, lr=5e-3, eps=1e-6)
    if how.startswith("zero"):
        return _engine(model, optimizer, int(how[-1]), micro), optimizer
    return model, optimizer


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, micro: int) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES // 2 // micro,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # Muon
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def refusals() -> dict[str, str]:
    """What several ranks are told that would drift apart, or of which not everything is found. Every rank."""
    from torch.distributed.tensor import DTensor

    from loqt_scale.errors import UserError
    from loqt_scale.strategies import alone, replicas

    dist.init_process_group("gloo")
    model, _, settings = converted("none")
    optimizer = torch.optim.AdamW(trained(model))
    told = {}

    def refused(name: str, wrapped: nn.Module, by: torch.optim.Optimizer) -> None:
        try:
            MergeCoordinator(wrapped, by, settings)
        except UserError as error:
            told[name] = str(error)

    refused("plain", model, optimizer)
    device = torch.device("cpu")
    for editing in (replicas(device), alone(device)):
        MergeCoordinator(model, optimizer, settings, editing=editing)
    compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    told["compiled ddp"] = MergeCoordinator(compiled, optimizer, settings).description
    one, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    fully_shard(model.blocks[0], mesh=one)  # type: ignore[index]
    refused("partly sharded", model, torch.optim.AdamW(trained(model)))
    fully_shard(model.blocks[1], mesh=other)  # type: ignore[index]
    refused("two meshes", model, torch.optim.AdamW(trained(model)))
    model, _, settings = converted("none")
    stale = torch.optim.AdamW(trained(model))
    fully_shard(model, mesh=one)
    refused("optimizer before fully_shard", model, stale)
    fresh = torch.optim.AdamW(trained(model))
    loss_of(model, batch(0)).detach()  # without a backward pass, the root's parameters stay whole
    merges = MergeCoordinator(model, fresh, settings)
    assert merges.description.startswith("fully_shard") and isinstance(model.blocks[0].up.factor, DTensor)  # type: ignore[index,union-attr]
    unplaced = muon(model, lr=1e-2)
    loss_of(model, batch(0)).backward()
    try:
        unplaced.step()
    except UserError as error:
        told["muon before attach"] = str(error)
    return told


def run_example(name: str, **arguments: Any) -> list[float]:
    """The losses of an example for several ranks, in its short form. Every rank."""
    import importlib
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    if name == "own_deepspeed":
        _join("zero1")
    losses: list[float] = importlib.import_module(name).train(steps=4, **arguments)
    return losses
