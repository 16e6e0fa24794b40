"""One device and the host's memory: what a step does not need at once waits in host memory.

    offload     in host memory                                             and therefore
    base        packed W and P of the blocks                               fetched for each block, forward and backward
    optimizer   everything that trains, its gradients and moments          fetched likewise; updated by the host's cores
    all         both

FSDP2 does the fetching, over a mesh of one: it has a stream for it, fetches the next block while this one computes, and
frees what a block was given when it is through, also in what autograd has saved. What is not offloaded stays with the
device and out of FSDP's hands. Everything else is as with one process (`base`), so are the numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from loqt_scale.config import Offload
from loqt_scale.optim import open_moments
from loqt_scale.strategies.fsdp_bytes import packed_bytes_may_be_sharded
from loqt_scale.strategies.fsdp_model import FSDPModelStrategy


def is_offloaded(trains: bool, what: Offload) -> bool:
    """Whether a parameter waits in host memory: `base` means what does not train, `optimizer` what does."""
    return what == "all" or what == ("optimizer" if trains else "base")


class OffloadStrategy(FSDPModelStrategy):
    """See the module's docstring.

    Args:
        device: Where the model computes.
        compute_dtype: float32, or bfloat16 for mixed precision.
        what: What waits in host memory: base, optimizer or all.
    """

    name = "single"

    def __init__(self, device: torch.device, compute_dtype: torch.dtype, what: Offload) -> None:
        super().__init__(device, compute_dtype)
        self._what = what
        self._joined = not dist.is_initialized()
        if self._joined:  # a group of one, which FSDP2's mesh asks for
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self._mesh = init_device_mesh(device.type, (1,))

    @property
    def description(self) -> str:
        """`single, base in host memory`."""
        kept = {"base": "base", "optimizer": "what trains and its states", "all": "base, what trains and its states"}
        return f"{self.name}, {kept[self._what]} in host memory"

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Gives what is offloaded, block by block, into FSDP2's hands, on the meta device: nothing is allocated."""
        stays = {parameter for parameter in model.parameters() if not is_offloaded(parameter.requires_grad, self._what)}
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for module in (*blocks, model):
            # the root's are needed until the backward pass begins, and again at once
            again = module is not model
            with packed_bytes_may_be_sharded():
                fully_shard(
                    module, mesh=self._mesh, reshard_after_forward=again, offload_policy=policy, ignored_params=stays
                )
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

    def read(self, parameter: Tensor) -> Tensor:
        """All of it, on the device."""
        return self.local(parameter.detach()).to(self.device)

    def gather(self, parameter: Tensor) -> Tensor:
        """All of it, on the device."""
        return self.read(parameter)

    def edit_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, edit: Callable[..., None]
    ) -> None:
        """Edits copies on the device."""
        with open_moments(optimizer, parameter, self.local) as moments:
            if moments is not None:
                copies = [self.read(moment) for moment in moments]
                edit(*copies)
                for moment, edited in zip(moments, copies, strict=True):
                    self.local(moment).copy_(edited)

    def update(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_norm: float,
    ) -> Tensor:
        """As with one process, and the norm is returned on the device, where the loss is.

        Gradients, and so the norm, are in host memory, and the host's optimizer reads from the norm whether to skip.
        The norm must not make the detour over the device before that: torch's fused AdamW would copy the verdict back
        without waiting, and read it before it has arrived. So it is moved only after the update.
        """
        return super().update(model, optimizer, parameters, max_norm=max_norm).to(self.device)

    def close(self) -> None:
        """Ends the group of one."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
