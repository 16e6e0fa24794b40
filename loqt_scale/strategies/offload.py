"""One device and the host's memory: what a step does not need at once waits in host memory.

    offload     in host memory                                             and therefore
    base        packed W and P of the blocks                               fetched for each block, forward and backward
    optimizer   everything that trains, its gradients and moments          fetched likewise; updated by the host's cores
    all         both

FSDP2 does the fetching, over a mesh of one: it has a stream for it, fetches the next block while this one computes, and
frees what a block was given when it is through, also in what autograd has saved. What is not offloaded stays with the
device and out of FSDP's hands. Everything else is as with one process (`single`), so are the numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from loqt_scale.config import Offload
from loqt_scale.optim import open_states
from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.comm import SingleComm
from loqt_scale.strategies.editing import EditStates, ReplicaEditing
from loqt_scale.strategies.fsdp_bytes import packed_bytes_may_be_sharded
from loqt_scale.strategies.fsdp_model import FSDPModelPlacement, FSDPModelStep, share_vocabulary


def is_offloaded(trains: bool, what: Offload) -> bool:
    """Whether a parameter waits in host memory: `base` means what does not train, `optimizer` what does."""
    return what == "all" or what == ("optimizer" if trains else "base")


def offloaded(device: torch.device, compute_dtype: torch.dtype, what: Offload) -> Strategy:
    """The strategy of one process whose device is too small.

    Args:
        device: Where the model computes.
        compute_dtype: float32, or bfloat16 for mixed precision.
        what: What waits in host memory: base, optimizer or all.
    """
    waits = {"base": "base", "optimizer": "what trains and its states", "all": "base, what trains and its states"}
    comm, placement = GroupOfOne(device), OffloadPlacement(device, what)
    return Strategy(
        description=f"single, {waits[what]} in host memory",
        comm=comm,
        placement=placement,
        step=OffloadStep(comm, placement, compute_dtype),
        editing=OffloadEditing(comm, placement),
    )


class GroupOfOne(SingleComm):
    """One process in a process group of its own, which FSDP2's mesh asks for; nothing is sent in it.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._joined = not dist.is_initialized()
        if self._joined:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def close(self) -> None:
        """Ends the group."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()


class OffloadPlacement(FSDPModelPlacement):
    """Some parameters in host memory, in FSDP2's hands, the others on the device.

    Args:
        device: Where the model computes; there is a process group.
        what: What waits in host memory.
    """

    def __init__(self, device: torch.device, what: Offload) -> None:
        super().__init__(device)
        self._what, self._mesh = what, init_device_mesh(device.type, (1,))

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Gives what is offloaded, block by block, into FSDP2's hands, on the meta device: nothing is allocated."""
        stays = {parameter for parameter in model.parameters() if not is_offloaded(parameter.requires_grad, self._what)}
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        share = partial(fully_shard, mesh=self._mesh, offload_policy=policy, ignored_params=stays)
        with packed_bytes_may_be_sharded():
            for block in blocks:
                share(block, reshard_after_forward=True)
            share_vocabulary(model, share)
            share(model, reshard_after_forward=False)  # needed until the backward pass begins, and again at once
        for block, following in pairwise(blocks):
            assert isinstance(block, FSDPModule) and isinstance(following, FSDPModule)
            block.set_modules_to_forward_prefetch([following])
        return model

    def allocate(self, model: nn.Module) -> None:
        """Host memory for what is offloaded, the device's for the rest."""
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = torch.empty_like(parameter.data, device=self.device)


class OffloadStep(FSDPModelStep):
    """As with one process."""

    def update(
        self, model: nn.Module, optimizer: Optimizer, parameters: Sequence[nn.Parameter], *, max_norm: float
    ) -> Tensor:
        """As with one process, and the norm is returned on the device, where the loss is.

        Gradients, and so the norm, are in host memory, and the host's optimizer reads from the norm whether to skip.
        The norm must not make the detour over the device before that: torch's fused AdamW would copy the verdict back
        without waiting, and read it before it has arrived. So it is moved only after the update.
        """
        return super().update(model, optimizer, parameters, max_norm=max_norm).to(self.comm.device)


class OffloadEditing(ReplicaEditing):
    """Merges compute on the device, on copies of what waits in host memory."""

    def read(self, parameter: Tensor) -> Tensor:
        """All of it, on the device."""
        return self.placement.local(parameter.detach()).to(self.device)

    def gather(self, parameter: Tensor) -> Tensor:
        """All of it, on the device."""
        return self.read(parameter)

    def edit_moments(self, optimizer: Optimizer, parameter: nn.Parameter, edit: EditStates) -> None:
        """Edits copies on the device."""
        with open_states(optimizer, parameter, self.placement.local) as states:
            copies = [(kind, self.read(state)) for kind, state in states]
            edit(self.placement.stored_rows(parameter)[0], copies)
            for (_, state), (_, edited) in zip(states, copies, strict=True):
                state.copy_(edited)
