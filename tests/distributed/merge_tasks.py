"""What the rank processes collect for a merge, beside what a naive all-reduce of whole gradients gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig, MergeConfig, QuantizationConfig, SubspaceConfig
from loqt_scale.layers import LoQTLinear, convert_to_loqt, loqt_layers
from loqt_scale.merge import MergeCoordinator
from loqt_scale.merge.collection import GradientCollection
from loqt_scale.merge.probes import attach_probes
from loqt_scale.merge.subspace import deal
from loqt_scale.strategies import GroupComm, ReplicaEditing, Replicated, SingleComm

WIDTH, DEPTH = 16, 7
SKETCHED = SubspaceConfig(method="sketch")


class Residual(nn.Module):
    """A stack of linears of which a pass may use some, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: Tensor, used: Sequence[int]) -> Tensor:
        for index in used:
            x = x + torch.tanh(self.layers[index](x))
        return x


def _layers() -> tuple[Residual, dict[str, LoQTLinear]]:
    torch.manual_seed(0)
    model = Residual()
    convert_to_loqt(model, LoQTConfig(rank=4, subspace=SKETCHED))
    return model, dict(loqt_layers(model))


def _passes(model: Residual, rank: int, order: Sequence[Sequence[int]]) -> None:
    """One backward pass for each list of layers, on this rank's own data."""
    for index, used in enumerate(order):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * index + rank))
        model(x, used).square().sum().backward()


def collect(*, orders: list[list[list[int]]], known: bool, wave: int, budget: int) -> dict[str, Any]:
    """Twice over: the sums that this rank's owner role got, against the naive ones; and what was in memory at most.

    Args:
        orders: For each rank, for each pass, the layers that it uses, in that order.
        known: Whether the number of passes is told beforehand.
        wave: Layers of a wave, in units of the world size.
        budget: Bytes in the air.
    """
    comm = GroupComm(torch.device("cpu"))
    mine = orders[comm.rank]
    errors, waves, most = [], [], 0
    for turn in range(2):
        model, layers = _layers()
        attach_probes(layers, SKETCHED, seed=turn, device=comm.device)
        _passes(model, comm.rank, mine)
        naive = {}
        for name, layer in layers.items():
            assert layer.probe is not None
            grad = layer.probe.leaf.grad
            naive[name] = torch.zeros(layer.probe.leaf.shape) if grad is None else grad.clone()
            dist.all_reduce(naive[name])

        attach_probes(layers, SKETCHED, seed=turn, device=comm.device)
        owners, got = deal(layers, comm.world_size), {}

        def keep(collected: dict[str, Tensor], got: dict[str, Tensor] = got) -> None:
            waves.append(len(collected))
            got.update(collected)

        collection = GradientCollection(
            layers,
            owners,
            wave=wave * comm.world_size,
            reducer=comm.open_reducer(),
            passes=len(mine) if known else None,
            budget=budget,
            factorise=keep,
        )
        _passes(model, comm.rank, mine)
        early = len(got)
        held = [*collection._early.values(), *collection._sums.values(), *(flight[1] for flight in collection._flights)]
        held += [
            layer.probe.leaf.grad for layer in layers.values() if layer.probe and layer.probe.leaf.grad is not None
        ]
        most = max(most, sum(tensor.nbytes for tensor in held) // next(iter(naive.values())).nbytes)
        collection.finish()
        assert set(got) == {name for name, owner in owners.items() if owner == comm.rank}
        assert all(layer.probe is None for layer in layers.values())
        errors += [float((got[name] - naive[name]).abs().max() / naive[name].abs().max()) for name in got]
    comm.close()
    return {"error": max(errors), "early": early, "held": most, "waves": waves}


def drop_then_collect(*, passes: int) -> float:
    """A collection that is dropped after uneven use leaves no message behind that the next could take for its own."""
    comm = GroupComm(torch.device("cpu"))
    model, layers = _layers()
    owners, got = deal(layers, comm.world_size), {}
    for turn in range(2):
        attach_probes(layers, SKETCHED, seed=0, device=comm.device)
        collection = GradientCollection(
            layers,
            owners,
            wave=comm.world_size,
            reducer=comm.open_reducer(),
            passes=passes,
            budget=0,
            factorise=got.update,
        )
        used = list(range(DEPTH)) if turn or comm.rank else [0, 1]
        _passes(model, comm.rank, [used] * passes)
        if turn == 0:
            collection.drop()
            got.clear()
        else:
            collection.finish()
    attach_probes(layers, SKETCHED, seed=0, device=comm.device)
    _passes(model, comm.rank, [list(range(DEPTH))] * passes)
    error = 0.0
    for name, layer in layers.items():
        assert layer.probe is not None and layer.probe.leaf.grad is not None
        dist.all_reduce(layer.probe.leaf.grad)
        if name in got:
            error = max(
                error, float((got[name] - layer.probe.leaf.grad).abs().max() / layer.probe.leaf.grad.abs().max())
            )
    comm.close()
    return error


# for each step, what each of two ranks uses; in the last one of all, two layers are used by nobody
ROUTES: list[tuple[list[int], list[int]]] = [
    ([0, 1, 2, 3, 4, 5], list(range(DEPTH))),
    ([0, 1], [1, 6]),
    ([], [2, 3, 4]),
    ([0, 5, 1], [3, 5, 2]),
]


def routed_merges(*, known: bool) -> dict[str, Any]:
    """Merges in every step, over layers that some ranks use: (kept layers, parameters). One process does both parts."""
    single = dist.get_world_size() == 1 if dist.is_initialized() else True
    comm = SingleComm(torch.device("cpu")) if single else GroupComm(torch.device("cpu"))
    torch.manual_seed(0)
    model = Residual()
    config = LoQTConfig(
        rank=4, merge=MergeConfig(gap=1, schedule="constant"), quantization=QuantizationConfig(weight="none")
    )
    convert_to_loqt(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    editing = ReplicaEditing(comm, Replicated(comm.device))
    merges = MergeCoordinator(model, optimizer, config, total_steps=len(ROUTES), editing=editing)
    kept = []
    for step, routes in enumerate(ROUTES):
        merges.prepare(step, backward_passes=(2 if single else 1) if known else None)
        for rank, used in enumerate(routes):
            if single or rank == comm.rank:
                x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
                (model(x.requires_grad_(), used).square().sum()).backward()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if not single:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        report = merges.finish(step)
        optimizer.zero_grad()
        kept.append([] if report is None else sorted(report.kept))
    comm.close()
    return {"kept": kept, "model": {name: value.float() for name, value in model.state_dict().items()}}
