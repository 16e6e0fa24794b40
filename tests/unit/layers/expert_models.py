"""A fused module of experts as transformers has it, and the same experts one by one: the oracle."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loqt_scale.config import LoQTConfig
from loqt_scale.layers import LoQTLinear

EXPERTS, HIDDEN, INNER, CHOICES = 4, 32, 48, 2


def fused(kind: str) -> nn.Module:
    """Experts of Mixtral, or of gpt_oss: transposed, with biases and a gate of its own; random values, float32."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    config = MixtralConfig(**settings) if kind == "mixtral" else GptOssConfig(**settings)
    config._experts_implementation = "eager"
    module = MixtralExperts(config) if kind == "mixtral" else GptOssExperts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def routed(seed: int, *, experts: int = EXPERTS, tokens: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, experts of each token, their weights), of which the last experts may get no token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(CHOICES, dim=-1)
    return hidden, index, weights


class OneByOne(nn.Module):
    """The experts of a fused module as a list of LoQTLinear each, with the same weights."""

    def __init__(self, module: nn.Module, config: LoQTConfig) -> None:
        super().__init__()
        self.around = copy.deepcopy(module)
        self.gate_up_proj = _layers(module.gate_up_proj, config, transposed=bool(module.is_transposed))
        self.down_proj = _layers(module.down_proj, config, transposed=bool(module.is_transposed))
        del self.around.gate_up_proj, self.around.down_proj

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        around: Any = self.around
        total = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            tokens, choices = torch.where(index == expert)
            if len(tokens) == 0:
                continue
            rows = self.gate_up_proj[expert](hidden[tokens])
            rows = rows + around.gate_up_proj_bias[expert] if around.has_bias else rows
            rows = self.down_proj[expert](around._apply_gate(rows))
            rows = rows + around.down_proj_bias[expert] if around.has_bias else rows
            total = total.index_add(0, tokens, rows * weights[tokens, choices, None])
        return total


def _layers(weight: Tensor, config: LoQTConfig, *, transposed: bool) -> nn.ModuleList:
    layers = nn.ModuleList()
    for matrix in weight.detach():
        rows, cols = matrix.shape
        sizes = (rows, cols) if transposed else (cols, rows)
        layer = LoQTLinear(*sizes, bias=False, config=config, transposed=transposed)
        layer.base.store(matrix)
        layers.append(layer)
    return layers


def exact(config: LoQTConfig) -> LoQTConfig:
    """The same settings with everything stored exactly."""
    return replace(config, quantization=replace(config.quantization, weight="none", projection="none"))
