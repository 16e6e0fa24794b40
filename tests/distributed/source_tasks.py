"""Weights before quantization as several ranks give them: experts cut unevenly, unequal kinds."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loqt_scale import LoQTConfig, MergeConfig, QuantizationConfig, attach, convert_to_loqt
from loqt_scale.errors import UserError
from loqt_scale.strategies import replicas

STEPS = 5


def merge_experts(scheme: str, init: str) -> dict[str, Any]:
    """Losses and merges of three experts, their weights from before distributed if there are ranks. Every rank."""
    several = _join()
    config = LoQTConfig(
        rank=8,
        init=init,  # type: ignore[arg-type]
        merge=MergeConfig(gap=2, schedule="constant"),
        quantization=QuantizationConfig(weight=scheme, projection=scheme),  # type: ignore[arg-type]
    )
    model = _experts()
    before: dict[str, Any] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if several:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        before = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in before.items()}
    convert_to_loqt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    editing = replicas(torch.device("cpu")) if several else None
    merges = attach(model, optimizer, config, total_steps=50, initial_weights=before, editing=editing)
    losses = [_step(model, merges, optimizer, step) for step in range(STEPS)]
    return {"losses": [loss for loss, _ in losses], "merged": sum(merged for _, merged in losses)}


def unequal_kinds() -> str:
    """What is said if rank 1 gives no weights. Every rank."""
    _join()
    model, config = _experts(), LoQTConfig(rank=8)
    before = model.state_dict()
    convert_to_loqt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    try:
        attach(
            model,
            optimizer,
            config,
            initial_weights=None if dist.get_rank() else before,
            editing=replicas(torch.device("cpu")),
        )
    except UserError as error:
        return str(error)
    return ""


def _join() -> bool:
    if "WORLD_SIZE" not in os.environ:
        return False
    dist.init_process_group("gloo")
    return True


def _experts() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 3}
    model = nn.ModuleDict({"experts": MixtralExperts(MixtralConfig(**sizes))})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def _step(model: Any, merges: Any, optimizer: Any, step: int) -> tuple[float, bool]:
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(24, 32, generator=generator)
    weights, index = torch.rand(24, 3, generator=generator).topk(2, dim=-1)
    merges.prepare()
    loss = (model["experts"](hidden, index, weights) - hidden.sin()).square().mean()
    loss.backward()
    optimizer.step()
    report = merges.finish()
    optimizer.zero_grad()
    return float(loss.detach()), report is not None
