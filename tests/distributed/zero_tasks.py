"""Looks into a DeepSpeed engine after a merge."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from loqt_scale.functional.quantization import unpack
from loqt_scale.layers import loqt_layers
from loqt_scale.model import loss as loss_module
from loqt_scale.strategies.zero.flat import master_fragments, masters
from loqt_scale.strategies.zero.strategy import ZeroStrategy
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import kinds_held, make_trainer, moment_tensors
from tests.distributed.tasks import small_config


def copies_after_merge(**settings: Any) -> list[dict[str, Tensor]]:
    """B of each layer after the second merge: `parameter`, `master`, `first` and `second` moment. Every rank."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy) and trainer.merges is not None
    try:
        for step in range(trainer.merges.steps[1] + 1):
            trainer.step(step)
        copies = []
        for _, layer in loqt_layers(trainer.built.model):
            with zero.GatheredParameters([layer.factor]):
                parameter = layer.factor.detach().clone()
            found = {"parameter": parameter, "master": safe_get_full_fp32_param(layer.factor)}
            found["first"] = safe_get_full_optimizer_state(layer.factor, "exp_avg")
            found["second"] = safe_get_full_optimizer_state(layer.factor, "exp_avg_sq")
            copies.append({name: tensor.clone() for name, tensor in found.items()})
        return copies
    finally:
        strategy.close()


def packed_after_merge(**settings: Any) -> list[Tensor]:
    """Codes and scales of W and P of each layer after the first merge and a step, whole. Every rank."""
    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    assert trainer.merges is not None
    try:
        for step in (0, 1):
            trainer.step(step)
        tensors = []
        for _, layer in loqt_layers(trainer.built.model):
            packed = [p for p in layer.merged_parameters() if p.dtype == torch.uint8]
            tensors.extend(strategy.editing.gather(parameter).clone() for parameter in packed)
        return tensors
    finally:
        strategy.close()


def moments_through_merge(**settings: Any) -> dict[str, Any]:
    """Up to the second merge and through it, on any strategy. Every rank.

    Returns:
        before, after: (first, second) moment, whole, by name of what trains: as that merge finds and leaves them.
        old, new: P, whole, by name of its factor: likewise.
        fragments: Under ZeRO (first value, values, all values of the parameter) of what this rank's masters hold.
        held: `kinds_held`.
    """
    trainer = make_trainer(small_config(settings))
    assert trainer.merges is not None
    last, found = trainer.merges.steps[1], {}
    merge = trainer.merge

    def watched(step: int) -> dict[str, float]:
        if step == last:
            found.update(before=whole_moments(trainer), old=whole_bases(trainer))
        return merge(step)

    trainer.merge = watched  # type: ignore[method-assign]
    try:
        for step in range(last + 1):
            trainer.step(step)
        found |= {"after": whole_moments(trainer), "new": whole_bases(trainer)}
        return found | {"fragments": fragments_of(trainer), "held": kinds_held(trainer)}
    finally:
        trainer.strategy.close()


def whole_moments(trainer: Trainer) -> dict[str, tuple[Tensor, ...]]:
    """(first, second) moment of each parameter that trains, whole, by name. Every rank."""
    editing, found = trainer.strategy.editing, {}
    for name, parameter in trainer.built.model.named_parameters():
        if parameter.requires_grad:
            shares = editing.read_moments(trainer.optimizer, parameter)
            assert shares is not None
            rows = getattr(parameter, "ds_shape", parameter.shape)[0]
            found[name] = tuple(editing.gather_shares(share, rows).clone() for share in shares)
    return found


def whole_bases(trainer: Trainer) -> dict[str, Tensor]:
    """P of each layer, whole and unpacked, by name of its factor. Every rank."""
    editing, bases = trainer.strategy.editing, {}
    for name, layer in loqt_layers(trainer.built.model):
        projection = layer.projection
        codes, *scales = editing.gather_together([t for t in (projection.codes, projection.scales) if t is not None])
        bases[f"{name}.factor"] = unpack(codes, scales[0], layer.spec.projection, torch.float32).clone()
    return bases


def fragments_of(trainer: Trainer) -> dict[str, tuple[int, int, int]]:
    """See `moments_through_merge`; checks on the way that they hold the parameter's own values."""
    strategy, places = trainer.strategy, {}
    if not isinstance(strategy, ZeroStrategy):
        return {}
    held = [
        (flat, fragment)
        for flat, fragments in master_fragments(trainer.model, strategy.engine.stage, strategy.comm.rank)
        for fragment in fragments
        if fragment.values
    ]
    for name, parameter in trainer.built.model.named_parameters():
        if parameter.requires_grad:
            whole = strategy.editing.gather(parameter)
            for flat, fragment in held:
                if fragment.parameter is parameter:
                    assert torch.equal(fragment.within(flat.detach()), fragment.within_whole(whole))
                    places[name] = fragment.first, fragment.values, whole.numel()
    return places


def bits_that_a_skipped_step_changes(**settings: Any) -> dict[str, int]:
    """Steps 0 to 2, of which rank 1's loss in step 1 is infinite: tensors changed by step 1 and by step 2. Every rank.

    Its gradient is finite by itself: the device and the host must judge the step alike all the same.
    """
    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    summed = loss_module.summed_loss

    def kept() -> list[Tensor]:
        states = [state for state in trainer.optimizer.state.values() if state]
        packed = [t for s in states for key in ("exp_avg", "exp_avg_sq") for t in moment_tensors(s[key])]
        tensors = [*masters(trainer.model, strategy.engine.stage), *packed, *(state["step"] for state in states)]
        return [tensor.detach().clone() for tensor in tensors]

    def changed(step: int, more: float) -> int:
        before = kept()
        with mock.patch.object(loss_module, "summed_loss", lambda *given: summed(*given) + more):
            trainer.step(step)
        trainer.finish_pending()
        return sum(not torch.equal(a, b) for a, b in zip(before, kept(), strict=True))

    try:
        trainer.step(0)
        skipped = changed(1, float("inf") if strategy.comm.rank == 1 else 0.0)
        return {"skipped": skipped, "applied": changed(2, 0.0), "updates": trainer.updates, "tensors": len(kept())}
    finally:
        strategy.close()
