"""Training loops of other people, which spread a small model over ranks their own way, beside one process."""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, convert_to_loqt, muon
from loqt_scale.errors import UserError
from loqt_scale.strategies import alone, packed_bytes_may_be_sharded, place, replicas

fully_shard = packed_bytes_may_be_sharded()(torchs_fully_shard)  # as users write before torch 2.13
STEPS, SAVED, SEQUENCES, LENGTH, VOCABULARY = 12, 7, 8, 16, 64


class Block(nn.Module):
    """A residual block whose sizes neither fill NF4 blocks by single rows nor divide by two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 86), nn.Linear(86, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Mixture(nn.Module):
    """Three fused experts, which two ranks cut in the middle, two for a token; 48 columns: four rows fill blocks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 48, "intermediate_size": 32, "num_local_experts": 3}
        self.router, self.experts = nn.Linear(48, 3, bias=False), MixtralExperts(MixtralConfig(**sizes))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, index = self.router(tokens).softmax(-1).topk(2)
        return x + self.experts(tokens, index, weights).view_as(x)


class Small(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 48)
        self.blocks = nn.Sequential(block(), block())
        self.lm_head = nn.Linear(48, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.embed(tokens)))


def config(scheme: str, rank: int = 8, **merge: Any) -> LoQTConfig:
    """Merges at 0, 5, 10."""
    quantization = QuantizationConfig(weight=scheme, projection=scheme)  # type: ignore[arg-type]
    return LoQTConfig(rank=rank, merge=MergeConfig(gap=5, schedule="constant", **merge), quantization=quantization)


def batch(step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """A rank's sequences, arithmetic progressions: (N, LENGTH)."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCABULARY, (SEQUENCES, 1), generator=generator)
    return ((first + 3 * torch.arange(LENGTH)) % VOCABULARY)[rank::world_size]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss."""
    return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def converted(scheme: str, *, experts: bool = False, **merge: Any) -> tuple[nn.Module, dict[str, Tensor], LoQTConfig]:
    """A converted model, its weights from before, its settings."""
    torch.manual_seed(0)
    model, settings = Small(Mixture if experts else Block), config(scheme, **merge)
    before = model.state_dict()
    convert_to_loqt(model, settings)
    return model, before, settings


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass
class Loop:
    """Somebody's own loop, and what it trains.

    Args:
        how: single, ddp, fsdp, hsdp (2 x 2), zero1, zero2 or zero3.
        model: Inside of all wrappers.
        wrapped: What is called.
        optimizer: Of it.
        merges: Of it.
        micro: Passes of a step.
        counted: Whether the passes are told beforehand.
        each_pass: Whether `prepare` and `finish` are called around each pass, not each step.
    """

    how: str
    model: nn.Module
    wrapped: Any
    optimizer: torch.optim.Optimizer
    merges: MergeCoordinator
    micro: int
    counted: bool
    losses: list[float] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    each_pass: bool = False

    def steps(self, start: int, stop: int) -> None:
        """Takes steps, notes losses and merges. Every rank."""
        rank, world_size = (0, 1) if self.how == "single" else (dist.get_rank(), dist.get_world_size())
        for step in range(start, stop):
            self.merges.prepare(backward_passes=self.micro if self.counted else None)
            total = torch.zeros(())
            for index, piece in enumerate(batch(step, rank, world_size).chunk(self.micro)):
                if self.each_pass and index > 0:
                    self.reports.append(self.merges.finish())
                    self.merges.prepare()
                total += self._pass(piece) / self.micro
            if not self.how.startswith("zero"):
                self.optimizer.step()
            self.reports.append(self.merges.finish())
            self.optimizer.zero_grad()
            if self.how != "single":
                dist.all_reduce(total)
            self.losses.append(float(total) / world_size)

    def _pass(self, piece: Tensor) -> Tensor:
        loss = loss_of(self.wrapped, piece)
        if self.how.startswith("zero"):
            self.wrapped.backward(loss)
            self.wrapped.step()
        else:
            (loss / self.micro).backward()
        return loss.detach()

    def save(self, folder: str) -> Any:
        """Everything from which a run goes on; of an engine in a folder. Every rank."""
        if self.how.startswith("zero"):
            self.wrapped.save_checkpoint(folder, "last", client_state={"merges": self.merges.state_dict()})
            return folder
        return copy.deepcopy([each.state_dict() for each in (self.model, self.optimizer, self.merges)])

    def load(self, saved: Any) -> None:
        """Goes on from there. Every rank."""
        if self.how.startswith("zero"):
            self.merges.load_state_dict(self.wrapped.load_checkpoint(saved, "last")[1]["merges"])
            return
        for each, state in zip((self.model, self.optimizer, self.merges), saved, strict=True):
            each.load_state_dict(state)


def make_loop(
    how: str,
    scheme: str,
    *,
    micro: int = 1,
    counted: bool = False,
    states: str = "",
    experts: bool = False,
    scattered: bool = False,
    each_pass: bool = False,
) -> Loop:
    """A loop before its first step. Every rank.

    Args:
        how: See `Loop`.
        scheme: How W and P are stored.
        micro: See `Loop`.
        counted: See `Loop`.
        states: Of our Muon's moments; "": torch's AdamW.
        experts: Whether the blocks are mixtures.
        scattered: Whether the weights before quantization are given as rows of all ranks, whatever mesh the model has.
        each_pass: See `Loop`.
    """
    rank = 32 if states == "int8" else 8  # fewer columns are too few for a block of codes
    model, before, settings = converted(scheme, experts=experts, rank=rank)
    wrapped, optimizer = _spread(how, model, micro, states)
    if scattered:
        everybody = init_device_mesh("cpu", (dist.get_world_size(),))
        before = {name: distribute_tensor(weight.clone(), everybody, [Shard(0)]) for name, weight in before.items()}
    merges = MergeCoordinator(wrapped, optimizer, settings, initial_weights=before)
    return Loop(how, model, wrapped, optimizer, merges, micro, counted, each_pass=each_pass)


def train_own(how: str, scheme: str, *, saved_in: str = "", **given: Any) -> dict[str, Any]:
    """Losses, kind that was found and merges of somebody's own loop. Every rank.

    Args:
        how: See `Loop`.
        scheme: How W and P are stored.
        saved_in: A folder: the loop is saved after step 7, and another goes on, whose losses come back as `again`.
        **given: Of `make_loop`.
    """
    if how != "single":
        _join(how)
    loop = make_loop(how, scheme, **given)
    loop.steps(0, SAVED if saved_in else STEPS)
    result: dict[str, Any] = {"found": loop.merges.description, "kept in": _dtypes(loop.optimizer)}
    if saved_in:
        saved = loop.save(saved_in)
        loop.steps(SAVED, STEPS)
        other = make_loop(how, scheme, **given)
        other.load(saved)
        other.steps(SAVED, STEPS)
        result["again"] = other.losses
    if how.startswith("zero"):
        _close(loop.wrapped)
    means = [report.means() for report in loop.reports if report is not None]
    return result | {"losses": loop.losses, "merges": means, "steps": loop.merges.steps}


def train_full(how: str, *, placed: bool = True) -> dict[str, Any]:
    """Losses of a full-rank model under Muon, some matrices taller and some wider, and what was found. Every rank.

    Args:
        how: See `Loop`.
        placed: Whether the optimizer is told how the model is spread; else what its first step raises comes back.
    """
    if how != "single":
        _join(how)
    rank, world_size = (0, 1) if how == "single" else (dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model, losses = Small(), []
    matrices = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("up", "down")]
    wrapped, optimizer = _spread(how, model, 1, "float32", matrices)
    found = place(wrapped, optimizer) if placed else ""
    try:
        for step in range(5 if placed else 1):
            loss = loss_of(wrapped, batch(step, rank, world_size))
            wrapped.backward(loss) if how.startswith("zero") else loss.backward()
            wrapped.step() if how.startswith("zero") else optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if how != "single":
                dist.all_reduce(total)
            losses.append(float(total) / world_size)
    except UserError as error:
        found = str(error)
    if how.startswith("zero"):
        _close(wrapped)
    return {"losses": losses, "found": found}


def _dtypes(optimizer: torch.optim.Optimizer) -> set[str]:
    moments = [value for own in optimizer.state.values() for value in own.values() if hasattr(value, "tensors")]
    return {str(moment.tensors()[0].dtype) for moment in moments}


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


def _spread(
    how: str, model: nn.Module, micro: int, states: str, dense_layers: Sequence[str] = ()
) -> tuple[nn.Module, torch.optim.Optimizer]:
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how in ("fsdp", "hsdp"):
        names = ("replicate", "shard") if how == "hsdp" else ("dp",)
        mesh = init_device_mesh("cpu", (2, 2) if how == "hsdp" else (dist.get_world_size(),), mesh_dim_names=names)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained(model), lr=5e-3, eps=1e-6)
    if states:
        optimizer = muon(model, lr=5e-3, eps=1e-6, states=states, dense_layers=dense_layers)  # type: ignore[arg-type]
    if how.startswith("zero"):
        return _engine(model, optimizer, int(how[-1]), micro), optimizer
    return model, optimizer


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, micro: int, **zero: Any) -> Any:
    import deepspeed

    persistence = {"stage3_param_persistence_threshold": 0} if micro == 1 else {}  # else small ones stay whole
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES // 2 // micro,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": stage, **persistence, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # Muon
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def refusals() -> dict[str, str]:
    """What several ranks are told that would drift apart, or of which not everything is found. Every rank."""
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


def refused_engine() -> str:
    """What an engine's owner is told whose settings break merges. Every rank."""
    from loqt_scale.errors import UserError

    _join("zero2")
    model, _, settings = converted("none")
    optimizer = torch.optim.AdamW(trained(model))
    engine = _engine(model, optimizer, 2, 1, round_robin_gradients=True)
    try:
        MergeCoordinator(engine, optimizer, settings)
    except UserError as error:
        return str(error)
    finally:
        _close(engine)
    return "nothing"


def run_example(name: str, out: str, arguments: Sequence[str] = ()) -> str:
    """What an example for several ranks prints, in its short form, as torchrun starts it. Every rank."""
    examples, printed = Path(__file__).parents[2] / "examples", io.StringIO()
    sys.path.insert(0, str(examples))
    sys.argv = [name, "--short", "--out", out, *arguments]
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    return printed.getvalue()
