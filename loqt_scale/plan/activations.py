"""What forward and backward take of a rank, memory and operations, by running them on tensors that have no storage.

Formulas for activations go stale with every model and every version of a library. So the step is really taken, by the
model's own code, under torch's fake tensors: every operator says which tensors it would make, `PeakMeter` adds up the
bytes that are alive, and seconds later the highest moment is known, for 13B too.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loqt_scale.config import RunConfig, TrainConfig
from loqt_scale.layers import loqt_layers
from loqt_scale.merge import attach_probes
from loqt_scale.model.build import design_model, recompute_blocks
from loqt_scale.model.documents import attend
from loqt_scale.model.structure import decoder_blocks
from loqt_scale.plan.operations import OperationMeter, Operations, extrapolated
from loqt_scale.strategies import DTYPES

DEPTHS = (2, 4)  # blocks of the two models that stand for a deep one


class PeakMeter(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, for as long as they live.

    Args:
        known: Tensors that do not count, e.g. parameters.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


class OnePass:
    """One forward and backward pass of one micro-batch, unsharded: bytes beyond parameters at its highest moment.

    Nothing is measured before it is asked for, nor twice: not every strategy needs every number.

    Args:
        config: The run; its micro-batch, model and compute dtype count.
        vocab_size: The tokenizer's.
    """

    def __init__(self, config: RunConfig, *, vocab_size: int) -> None:
        self._config, self._vocab_size = config, vocab_size

    @property
    def gradients_pile_up(self) -> int:
        """Gradients of what trains stay until the end."""
        return self._peak(free=False)

    @property
    def gradients_freed(self) -> int:
        """Each gradient is freed as soon as it is complete."""
        return self._peak(free=True)

    @property
    def merge_freed(self) -> int:
        """As `gradients_freed`, before a merge; sketches are freed as soon as they are complete, too."""
        return self._peak(free=True, probes=True)

    @property
    def operations(self) -> Operations:
        """What the operators of a pass do."""
        return self._taken(free=True)[1]

    @property
    def merge_operations(self) -> Operations:
        """The same before a merge."""
        return self._taken(free=True, probes=True)[1]

    def _peak(self, **how: bool) -> int:
        return self._taken(**how)[0]

    def _taken(self, **how: bool) -> Taken:
        config = self._config
        size = min(config.train.micro_batch_size, config.train.global_batch_size)
        train = TrainConfig(global_batch_size=size, micro_batch_size=size)
        plain = RunConfig(method=config.method, model=config.model, data=config.data, loqt=config.loqt, train=train)
        key = (repr(plain), self._vocab_size, *sorted(how.items()))
        if key not in _KNOWN:
            _KNOWN[key] = _measure(plain, self._vocab_size, **how)
        return _KNOWN[key]


Taken = tuple[int, Operations]  # bytes at the highest moment, what was done
_KNOWN: dict[tuple[object, ...], Taken] = {}


def _measure(config: RunConfig, vocab_size: int, **how: bool) -> Taken:
    """One pass; of a deep model two shallow ones, if each block adds the same."""
    model = design_model(config, vocab_size=vocab_size).model
    blocks = [block for _, block in decoder_blocks(model)]
    depth, repeated = len(blocks), {_outline(block) for block in blocks[DEPTHS[0] :]}
    if depth <= DEPTHS[-1] or len(repeated) > 1 or not hasattr(model.config, "num_hidden_layers"):
        return take_pass(config, model, **how)
    taken = []
    for shallow in DEPTHS:
        changed = {**config.model.overrides, "num_hidden_layers": shallow}
        smaller = replace(config, model=replace(config.model, overrides=changed))
        taken.append(take_pass(smaller, design_model(smaller, vocab_size=vocab_size).model, **how))
    (low, few), (high, more) = taken
    peak = high + (depth - DEPTHS[1]) * (high - low) // (DEPTHS[1] - DEPTHS[0])
    return peak, extrapolated(few, more, blocks=DEPTHS, depth=depth)


def _outline(block: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """What tells blocks of different kinds apart, dense ones and those of experts say."""
    return tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def take_pass(config: RunConfig, model: nn.Module, *, free: bool, probes: bool = False) -> Taken:
    """Takes one forward and backward pass of a meta model on fake tensors: its highest moment, its operations."""
    if config.model.activation_checkpointing:
        recompute_blocks(model)
    dtype = DTYPES[config.model.dtype]
    attend(model, config.data, separator=0)
    with FakeTensorMode():
        known = _make_fake(model)
        with PeakMeter(known) as meter, OperationMeter() as operations:
            for parameter in model.parameters() if free else ():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_free)
            if probes:
                layers = dict(loqt_layers(model))
                attach_probes(layers, config.loqt.subspace, seed=0, device=torch.device("cpu"))
                for layer in layers.values():
                    assert layer.probe is not None
                    layer.probe.leaf.register_post_accumulate_grad_hook(_free)
            tokens = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=tokens, targets=tokens)
            loss.backward()
        return meter.peak, operations.operations


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Gives a meta model fake CPU tensors in place of its own; tied ones stay tied. Under a FakeTensorMode."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}
    buffers: list[Tensor] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = parameter, nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module.named_buffers(recurse=False):
            buffers.append(torch.empty(buffer.shape, dtype=buffer.dtype))
            module._buffers[name] = buffers[-1]
    return [*(parameter for _, parameter in made.values()), *buffers]
