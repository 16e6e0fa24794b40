"""How somebody else spread a model over ranks: found from the model itself, and made an `Editing` for merges.

    found                                     editing                    ranks that share out rows
    a DeepSpeed engine, stages 1 to 3         `zero.editing`             all
    `fully_shard`, 1-D mesh                   `fsdp.ShardEditing`        the mesh
    `fully_shard`, 2-D mesh (HSDP)            `hybrid.HybridEditing`     a row of the mesh
    DistributedDataParallel                   `editing.ReplicaEditing`   its process group
    one process                               `editing.ReplicaEditing`   none

Wrappers that change no parameter are seen through: torch.compile's, Accelerate's, Fabric's. Whatever else several ranks
may be is refused: left to itself each would take P from its own gradients, and the ranks would drift apart without a
word. Process groups are the user's: used, never made nor destroyed, but for one beside them in which sketches travel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers import LoQTLayer, loqt_layers
from loqt_scale.optim import StreamedAdamW
from loqt_scale.process.environment import is_launched, launched_world_size
from loqt_scale.strategies.adopt_mesh import adopt_mesh
from loqt_scale.strategies.editing import Editing, ReplicaEditing
from loqt_scale.strategies.placement import Replicated
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.single import single_process
from loqt_scale.strategies.whole import reshard
from loqt_scale.strategies.zero.adopted import adopt_engine, base_optimizer, is_engine, is_held_by_engine


@dataclass(frozen=True)
class Adopted:
    """What was found.

    Args:
        description: In a few words, for people.
        model: The model inside of all wrappers.
        optimizers: What updates it, inside of all wrappers.
        editing: Its parameters and moments, for merges.
        check: Called before each merge step: raises if several ranks do by now what merges do not know. Local.
        engine: The DeepSpeed engine that counts passes and steps; None: there is none.
    """

    description: str
    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    editing: Editing
    check: Callable[[], None] = lambda: None
    engine: Any = None


def adopt(model: nn.Module, optimizer: Any) -> Adopted:
    """Finds out how a model is spread. Every rank.

    Args:
        model: A converted model, or what wraps it: the DeepSpeed engine, the DistributedDataParallel object.
        optimizer: What updates it, or several in a list; of an engine, its own counts instead.

    Raises:
        UserError: What was found, and the line to write.
    """
    model = _out_of_fabric(model)
    if is_engine(model):
        inner = unwrapped(model)
        description, editing = adopt_engine(model)
        return Adopted(description, inner, (base_optimizer(model),), editing, engine=model)
    inner, optimizers = unwrapped(model), unwrapped_optimizers(optimizer)
    reshard(inner)
    layers = dict(loqt_layers(inner))
    parameters = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    description, editing, check = _adopt_module(model, inner, layers, parameters)
    _tell_placement(optimizers, editing)
    return Adopted(description, inner, optimizers, editing, check)


def place(model: nn.Module, optimizer: Any) -> str:
    """Tells `muon`'s optimizer how a full-rank model is spread over ranks. Every rank, before the first step.

    `attach` does so for a model with LoQT layers.

    Args:
        model: The model, or what wraps it: the DeepSpeed engine, the DistributedDataParallel object.
        optimizer: What updates it, or several in a list; of an engine, its own counts instead.

    Returns:
        What was found, in a few words, for people.

    Raises:
        UserError: What was found, and the line to write.
    """
    model = _out_of_fabric(model)
    if is_engine(model):
        return adopt_engine(model)[0]
    inner = unwrapped(model)
    reshard(inner)
    description, editing, _ = _adopt_module(model, inner, {}, dict(inner.named_parameters()))
    _tell_placement(unwrapped_optimizers(optimizer), editing)
    return description


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of an engine, DistributedDataParallel, torch.compile, Fabric, in whatever order. Local."""
    model = _out_of_fabric(model)
    wraps = isinstance(model, DistributedDataParallel) or is_engine(model)
    inner = getattr(model, "module" if wraps else "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _out_of_fabric(model: nn.Module) -> nn.Module:
    """What Lightning's Fabric calls inside of its wrapper, which may be an engine. Local; Fabric is not imported."""
    for name in ("lightning.fabric.wrappers", "lightning_fabric.wrappers"):
        fabric = sys.modules.get(name)
        if fabric is not None and isinstance(model, fabric._FabricModule):
            inner: nn.Module = model._forward_module
            return inner
    return model


def unwrapped_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """The optimizers inside of Accelerate's, of torch's ZeroRedundancyOptimizer, of SAM. Local.

    Raises:
        UserError: It is no optimizer, or averages weights.
    """
    if isinstance(optimizer, (list, tuple)):
        return tuple(one for each in optimizer for one in unwrapped_optimizers(each))
    while isinstance(inner := _inside(optimizer), Optimizer):
        if "lookahead" in type(optimizer).__name__.lower():
            raise UserError(
                f"{type(optimizer).__name__} averages weights over many steps, but each merge gives the factors a new "
                "basis; give the factors to the optimizer inside of it"
            )
        optimizer = inner
    require_kind(optimizer, Optimizer, "the optimizer", "give a torch.optim.Optimizer, or a list of them")
    return (optimizer,)


def _inside(optimizer: Any) -> Any:
    """What a wrapper calls its optimizer: ZeroRedundancyOptimizer, Accelerate's, SAM's; None if it is no wrapper."""
    names = ("optim",) if isinstance(optimizer, ZeroRedundancyOptimizer) else ("optimizer", "base_optimizer")
    found = (getattr(optimizer, name, None) for name in names if not isinstance(optimizer, type))
    return next((inner for inner in found if isinstance(inner, Optimizer)), None)


def replicas(device: torch.device, group: Any = None) -> Editing:
    """For a loop that sums gradients over ranks by itself, each of which holds the whole model. Every rank.

    Args:
        device: Where this rank computes.
        group: The ranks; default: all.
    """
    return ReplicaEditing(GroupComm(device, group=group or dist.group.WORLD), Replicated(device))


def alone(device: torch.device) -> Editing:
    """For a rank that trains a model of its own, whatever the others do. Local."""
    return single_process(device).editing


def _tell_placement(optimizers: Iterable[Optimizer], editing: Editing) -> None:
    """Says to an optimizer of ours, made before anybody knew, how its parameters are spread. Local."""
    assert isinstance(editing, ReplicaEditing)
    placement = editing.placement
    for optimizer in optimizers:
        if isinstance(optimizer, StreamedAdamW):
            optimizer.number()
            optimizer.place(placement.local, lambda whole: placement.stored_rows(whole)[0], placement.row_shards)


def _adopt_module(
    model: nn.Module, inner: nn.Module, layers: Mapping[str, LoQTLayer], parameters: Mapping[str, Tensor]
) -> tuple[str, Editing, Callable[[], None]]:
    """What spreads a module that is no engine, judged by `parameters`, which are those that matter, by name."""
    _refuse_wrappers(model)
    device = next(iter(parameters.values())).device
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return *adopt_mesh(inner, parameters), lambda: None
    if any(map(is_held_by_engine, parameters.values())):
        raise UserError(
            "the model's parameters are in a DeepSpeed engine's hands; give the engine that deepspeed.initialize "
            "returned (under Accelerate: what accelerator.prepare(model) returned) in the place of the model"
        )
    ddp = _ddp(model, layers)
    if ddp is not None:
        comm = GroupComm(device, group=ddp.process_group)
        found = f"DistributedDataParallel, {comm.world_size} rank(s)"
        return found, ReplicaEditing(comm, Replicated(device)), partial(_refuse_join, ddp)
    _refuse_strangers()
    return "one process", alone(device), _refuse_strangers


def _ddp(model: nn.Module, layers: Mapping[str, LoQTLayer]) -> DistributedDataParallel | None:
    """The DistributedDataParallel that holds all layers; None: there is no such thing."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            inside = {id(layer) for _, layer in loqt_layers(module)}
            outside = [name for name, layer in layers.items() if id(layer) not in inside]
            if outside:
                raise UserError(
                    f"{outside[0]} is outside of the DistributedDataParallel that holds other LoQT layers, so its "
                    "gradient would not be averaged; wrap the whole model: DistributedDataParallel(model)"
                )
            return module
    return None


def _refuse_join(ddp: DistributedDataParallel) -> None:
    if ddp._join_config.enable:
        raise UserError(
            "inside of DistributedDataParallel.join() ranks whose batches are used up take no part in merges, and the "
            "others would wait for them; give all ranks as many batches (DistributedSampler does), without join()"
        )


def _refuse_wrappers(model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UserError(
            "the model is in FullyShardedDataParallel (FSDP1), which flattens parameters: codes, scales and factors "
            "could not be told apart; use FSDP2, `for block in blocks: fully_shard(block)` and `fully_shard(model)` "
            "(torch.distributed.fsdp), under Accelerate fsdp_version: 2"
        )
    if any(isinstance(module, DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise UserError(
            "the model is in DataParallel, whose copies on other GPUs live for one pass, so that merges would see part "
            "of its gradients; start a process for each GPU (torchrun) and wrap in DistributedDataParallel"
        )


def _refuse_strangers() -> None:
    """Several ranks, and nothing that sums their gradients."""
    joined = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if joined else (launched_world_size() if is_launched() else 1)
    if world_size == 1:
        return
    raise UserError(
        f"there are {world_size} ranks, but the model is neither in DistributedDataParallel, nor sharded by "
        "fully_shard, nor a DeepSpeed engine: each rank would find its own P, and they would drift apart in silence. "
        "Give the wrapped model (the DistributedDataParallel object or the engine itself, not what is inside of it); "
        "or, if your loop sums gradients over ranks by itself, editing=loqt_scale.strategies.replicas(device); or, if "
        "each rank trains a model of its own, editing=loqt_scale.strategies.alone(device)"
    )
