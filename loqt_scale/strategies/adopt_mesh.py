"""What a user's own `fully_shard` did: its meshes and placements, checked, and made an `Editing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from loqt_scale.errors import UserError
from loqt_scale.functional.shares import shard_range
from loqt_scale.optim import RowShards
from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import Editing, ShardEditing
from loqt_scale.strategies.fsdp_model import FSDPModelPlacement
from loqt_scale.strategies.hybrid import HybridEditing, column_and_row
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.whole import reshard

_SHARDED = (
    "call fully_shard on each block and then on the whole model, all with one mesh: fully_shard(model, mesh=mesh)"
)


class MeshPlacement(FSDPModelPlacement):
    """Rows of dim 0, cut by somebody's `fully_shard`.

    Args:
        shards: The ranks that together store each parameter once.
        model: The model, whose FSDP modules may be left unsharded by a forward pass.
    """

    def __init__(self, shards: Comm, model: nn.Module) -> None:
        super().__init__(shards.device, RowShards(shards.sum, shards.rank, shards.world_size))
        self._model = model

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """The model as it is: it is sharded already."""
        return model

    def settle(self) -> None:
        """Puts parameters back that a forward pass has left whole. Local."""
        reshard(self._model)


def adopt_mesh(model: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[str, Editing]:
    """What was found, and the parameters for merges. Every rank.

    Args:
        model: On which `fully_shard` was called.
        parameters: All of the LoQT layers', or of a full-rank model, by name; at least one is sharded.

    Raises:
        UserError: They are not all sharded on dim 0 of one mesh.
    """
    mesh = _only_mesh(parameters)
    _check_rows(parameters, mesh)
    device = _device(mesh, parameters)
    _warn_of_others(mesh)
    if mesh.ndim == 1:
        comm = GroupComm(device, group=mesh.get_group())
        return f"fully_shard over {comm.world_size} rank(s)", ShardEditing(comm, MeshPlacement(comm, model))
    comm, (replicas, shards) = GroupComm(device, group=_group_of(mesh)), column_and_row(mesh, device)
    editing = HybridEditing(comm, MeshPlacement(shards, model), shards=shards, replicas=replicas)
    return f"fully_shard, {replicas.world_size} replica(s) of {shards.world_size} shard(s) (HSDP)", editing


def _only_mesh(parameters: Mapping[str, Tensor]) -> DeviceMesh:
    """The mesh of all parameters."""
    meshes: dict[DeviceMesh, str] = {}
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            raise UserError(f"{name} is not sharded, but other parameters are; {_SHARDED}")
        meshes.setdefault(parameter.device_mesh, name)
    if len(meshes) > 1:
        found = "; ".join(f"{name} on {_shown(mesh)}" for mesh, name in meshes.items())
        raise UserError(f"parameters are sharded over {len(meshes)} meshes: {found}; {_SHARDED}")
    return next(iter(meshes))


def _check_rows(parameters: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Refuses what is not cut into rows as FSDP2 does by default."""
    expected: list[Any] = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        placements = list(parameter.placements)
        start, stop = shard_range(parameter.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1])
        exact = [type(one) for one in placements] == [type(one) for one in expected] and placements == expected
        if not exact or parameter.to_local().shape[0] != stop - start:
            raise UserError(
                f"{name} is placed as {tuple(placements)} on {_shown(mesh)}, but merges and Muon know (Shard(0),) "
                "on a 1-D mesh and (Replicate(), Shard(0)) on a 2-D one: leave tensor parallelism and "
                "shard_placement_fn away from LoQT layers"
            )
    ranks = mesh.mesh.reshape(-1, mesh.shape[-1])
    if not bool((ranks.diff(dim=1) > 0).all() and (ranks.diff(dim=0) > 0).all()):
        raise UserError(f"the ranks of {_shown(mesh)} are not in ascending order; write init_device_mesh")


def _warn_of_others(mesh: DeviceMesh) -> None:
    """Says it if there are ranks outside of the mesh, which may be meant for something else."""
    count = dist.get_world_size()
    if mesh.size() < count and not any(mesh.get_coordinate() or ()):
        warn_caller(
            f"LoQT: the layers are sharded over {_shown(mesh)}, but there are {count} ranks: nothing sums these "
            "gradients with the others. That is right if those have other layers (pipeline stages) or the same batches "
            "(tensor parallelism elsewhere); else they train models of their own: give fully_shard a mesh of all "
            "(Lightning: ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1))",
        )


def _device(mesh: DeviceMesh, parameters: Mapping[str, Tensor]) -> torch.device:
    local = next(iter(parameters.values()))
    assert isinstance(local, DTensor)
    if local.to_local().device.type != mesh.device_type:
        raise UserError(
            f"fully_shard keeps the LoQT layers on {local.to_local().device} (CPUOffloadPolicy) for a mesh of "
            f"{mesh.device_type}, which merges do not know; leave offload_policy out"
        )
    return local.to_local().device


def _group_of(mesh: DeviceMesh) -> Any:
    """All ranks of a mesh: everybody, or a group made of them."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True)


def _shown(mesh: DeviceMesh) -> str:
    names = f" {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
    return f"the mesh {tuple(mesh.shape)}{names} of ranks {mesh.mesh.flatten().tolist()}"
