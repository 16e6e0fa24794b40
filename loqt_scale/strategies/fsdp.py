"""FSDP2: every parameter is sharded on dim 0, and gathered unit by unit around forward and backward.

A *unit* is a module whose parameters FSDP2 gathers in one collective and frees together: each transformer block, the
embedding, the head, and the root for the rest (the last norm; an embedding and a head that share their weight, which
then stay as long as the root does). Packed bytes are ordinary frozen parameters of their unit: they are gathered with
it and never cast (mixed precision touches floating tensors only). Dim 0 of packed tensors counts row groups, so each
shard can be merged by itself. In a merge a rank works on the rows that it stores.

The ranks are a row, or with `parallel.shard_size` a 2-D mesh whose rows store the model once each (`hybrid`).

Nothing that trains changes between the micro-batches of one step. What then stays unsharded is a choice between memory
and bytes on the wire (`parallel.kept_between_passes`):

    kept         between the passes of a step                     units
    nothing      gradients are reduced after each pass            block, embedding, head, root
    gradients    whole gradients stay until the last pass         block, embedding, head, root
    trained      so do the gathered B, embeddings and head        block without B, B of each layer, root with the rest

Under `trained` B is a unit of its own in each layer, because its block's packed bytes come and go in every pass.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from loqt_scale.config import Kept
from loqt_scale.layers import loqt_layers
from loqt_scale.optim import RowShards
from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import ShardEditing
from loqt_scale.strategies.fsdp_bytes import packed_bytes_may_be_sharded
from loqt_scale.strategies.fsdp_model import FSDPModelPlacement, FSDPModelStep, share_vocabulary
from loqt_scale.strategies.hybrid import HybridEditing, mesh_of, words
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.registry import StrategyKind, StrategyRequest


class FSDPPlacement(FSDPModelPlacement):
    """Rows of dim 0, cut over the ranks that store the model once.

    Args:
        shards: These ranks.
        mesh: All ranks: shards, or replicas x shards.
        compute_dtype: Dtype that floating parameters are gathered in; gradients are reduced in float32.
        reshard_after_forward: Free gathered blocks between forward and backward.
        kept: What stays whole between the micro-batches of a step.

    Attributes:
        kept_gathered: Units that stay gathered between the micro-batches of a step.
    """

    def __init__(
        self, shards: Comm, mesh: DeviceMesh, compute_dtype: torch.dtype, *, reshard_after_forward: bool, kept: Kept
    ) -> None:
        super().__init__(shards.device, RowShards(shards.sum, shards.rank, shards.world_size))
        self._compute_dtype, self._reshard_after_forward, self._kept = compute_dtype, reshard_after_forward, kept
        self.kept_gathered: list[FSDPModule] = []
        self._mesh = mesh

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Applies `fully_shard` to each block and to the root, on the meta device: nothing is allocated."""
        mixed = self._compute_dtype != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self._compute_dtype if mixed else None, reduce_dtype=torch.float32 if mixed else None
        )
        share = partial(fully_shard, mesh=self._mesh, mp_policy=policy)
        inside = [layer for block in blocks for _, layer in loqt_layers(block)]
        layers = inside if self._kept == "trained" else []
        trained = {parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad}
        with packed_bytes_may_be_sharded():
            for block in blocks:
                share(block, reshard_after_forward=self._reshard_after_forward, ignored_params=trained)
            for layer in layers:  # after its block, which would else not look for packed bytes inside it
                share(layer, reshard_after_forward=False, ignored_params=set(layer.parameters()) - trained)
            if self._kept != "trained":
                share_vocabulary(model, share)
            share(model, reshard_after_forward=False)
        if self._kept == "trained":
            self.kept_gathered += [module for module in (*layers, model) if isinstance(module, FSDPModule)]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # sums, not means: the trainer's loss is already divided by the global token count
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def stored_rows(self, parameter: Tensor) -> tuple[int, int]:
        """This rank's chunk of dim 0."""
        start, stop = super().stored_rows(parameter)
        assert isinstance(parameter, DTensor) and parameter.to_local().shape[0] == stop - start
        return start, stop


class FSDPStep(FSDPModelStep):
    """Gradients are reduce-scattered, and updated where they are stored.

    Args:
        comm: The ranks.
        placement: Where the parameters lie.
        compute_dtype: float32, or bfloat16 for mixed precision.
        kept: What stays whole between the micro-batches of a step.
    """

    def __init__(self, comm: Comm, placement: FSDPPlacement, compute_dtype: torch.dtype, *, kept: Kept) -> None:
        super().__init__(comm, placement, compute_dtype)
        self._kept, self._kept_gathered = kept, placement.kept_gathered

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """FSDP2 does so for gradients that stay whole; the sums of shards are left to us. Local."""
        if self._kept == "nothing":
            super().sum_in_float32(parameters)

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Reduce-scatters gradients in the last micro-step, or in each; frees in the last what is kept gathered."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last or self._kept == "nothing")
        for module in self._kept_gathered:
            module.set_reshard_after_backward(last, recurse=False)
        return super().micro_step(model, last=last)

    def autocast(self) -> AbstractContextManager[object]:
        """None: FSDP2's mixed-precision policy gathers parameters in the compute dtype."""
        return nullcontext()

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Root of the sum of the shards' squares. Every rank. One all-reduce of one number."""
        squares = self.comm.sum(self.stored_norm(parameters).square())  # of all copies: these must not drift apart
        return (squares * (self.placement.shard_size / self.comm.world_size)).sqrt()


def _create(request: StrategyRequest) -> Strategy:
    parallel, compute_dtype = request.parallel, request.compute_dtype
    comm, kept = GroupComm(request.device, parallel.timeout_seconds, store=request.store), parallel.kept_between_passes
    mesh, shards, replicas = mesh_of(comm, parallel.shard_size or comm.world_size)
    placement = FSDPPlacement(
        shards, mesh, compute_dtype, reshard_after_forward=parallel.reshard_after_forward, kept=kept
    )
    step = FSDPStep(comm, placement, compute_dtype, kept=kept)
    editing, description = ShardEditing(comm, placement), "fsdp"
    if replicas is not None:
        editing = HybridEditing(comm, placement, shards=shards, replicas=replicas)
        description = f"fsdp, {words(comm.gather_objects(socket.gethostname()), shards.world_size)}"
    return Strategy(description=description, comm=comm, placement=placement, step=step, editing=editing)


FSDP = StrategyKind(name="fsdp", create=_create)
