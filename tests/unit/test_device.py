"""Steps and merges on a device that is not the CPU, where there is none: on fake tensors, which have no values.

Fake tensors refuse to mix devices, as CUDA's do, and cannot be read. So a tensor that is made on the CPU by mistake,
or a number that the host asks for, is found without a GPU. The device is `meta`, the only other one that autograd knows
in a build for CPUs. What the kernels of a GPU compute is for tests/cuda.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.functional import blockwise
from loqt_scale.merge import MergeCoordinator
from loqt_scale.merge.begun import BegunMerge
from loqt_scale.merge.model_merge import ModelMerge
from loqt_scale.merge.report import MERGE_DIAGNOSTICS
from loqt_scale.model.attention import PACKED
from loqt_scale.model.build import design_model
from loqt_scale.model.documents import attend
from loqt_scale.optim import UpdateInBackward, create_optimizer, fragment
from loqt_scale.strategies import single_process

ELSEWHERE = torch.device("meta")
RUN = ["--model.preset=llama_nano", "--loqt.rank=32", "--data.seq_len=32"]
DOUBLE = ["--loqt.quantization.weight=nf4_double", "--loqt.quantization.projection=nf4_double"]
FRUGAL = ["--optim.states=int8", "--model.dtype=bfloat16", "--model.trained_dtype=bfloat16"]
METHODS = [["--loqt.subspace.method=svd"], ["--loqt.subspace.method=randomized"]]
MUON = ["--optim.name=muon"]
MASKED_DOCUMENTS = ["--data.mask_documents=true"]
PER_LAYER = [*FRUGAL, "--optim.per_layer=true", "--optim.clip_norm=0"]


class Reads(TorchDispatchMode):
    """Answers 1 whenever a tensor is read, and counts those of the device."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].device == ELSEWHERE
            return 1.0 if args[0].is_floating_point() else 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def meta_passes_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta has no generators and no autocast, fused AdamW does not know it, and bitsandbytes reads its level tables."""
    generator, autocast = torch.Generator, torch.is_autocast_enabled

    class NoGenerator:
        def manual_seed(self, seed: int) -> None:
            assert seed >= 0

    def make(device: torch.device) -> Any:
        return NoGenerator() if torch.device(device) == ELSEWHERE else generator(device)

    monkeypatch.setattr(torch, "Generator", make)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind))
    adam = importlib.import_module("torch.optim.adam")  # torch.optim hides it
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)
    sizes = (256, 255)
    for home in (blockwise, fragment):
        monkeypatch.setattr(home, "level_tables", lambda signed, device: [torch.empty(n, device=device) for n in sizes])


def move(model: nn.Module) -> None:
    """Gives a meta model fake tensors of the device. Under a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=ELSEWHERE)
            module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=ELSEWHERE)


def _nothing_elsewhere(merging: ModelMerge, was_skipped: bool, seen: bool) -> str:
    return "" if seen and merging.search.quality.device == ELSEWHERE else "not there"


@pytest.mark.parametrize(
    "words",
    [[], *METHODS, DOUBLE, FRUGAL, PER_LAYER, MUON, [*PER_LAYER, *MUON, *MASKED_DOCUMENTS]],
    ids=["sketch", "svd", "randomized", "double", "frugal", "per layer", "muon", "muon per layer masked"],
)
def test_a_step_and_a_merge_stay_on_their_device(words: list[str]) -> None:
    config = parse_run_config([*RUN, *words])
    model = design_model(config, vocab_size=320).model
    attend(model, config.data, separator=256)
    attention: Any = model.config
    assert attention._attn_implementation == PACKED
    with FakeTensorMode(), Reads() as reads:
        move(model)
        strategy = single_process(ELSEWHERE)
        optimizer = create_optimizer(model, config.optim, streamed=config.streams_updates)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        per_layer = UpdateInBackward(trained, optimizer, strategy.placement.local) if config.optim.per_layer else None
        merges = MergeCoordinator(model, optimizer, config.loqt, total_steps=500, editing=strategy.editing)

        def step() -> Tensor:
            tokens = torch.zeros(2, config.data.seq_len, dtype=torch.int64, device=ELSEWHERE)
            model(input_ids=tokens, targets=tokens).backward()
            if per_layer is not None:
                return per_layer.take_squares().sqrt()
            return strategy.step.update(model, optimizer, trained, max_norm=config.optim.clip_norm)

        assert step().device == ELSEWHERE
        assert reads.count == 0, "the host waited for the device in a normal step"
        for merge in merges.steps[:2]:
            merges.prepare(merge, backward_passes=1)
            step()
            with pytest.MonkeyPatch.context() as patch:  # what a merge says of itself is read at its end, and must be
                patch.setattr(
                    BegunMerge,
                    "read",
                    lambda self, _: {name: [0.0] * len(MERGE_DIAGNOSTICS) for name in self.diagnostics},
                )
                patch.setattr(ModelMerge, "_reason_to_wait", _nothing_elsewhere)  # read before it
                assert merges.finish(merge) is not None
        assert all(p.device == ELSEWHERE for p in model.parameters())
        assert all(state["step"].device == ELSEWHERE for state in optimizer.state.values())
