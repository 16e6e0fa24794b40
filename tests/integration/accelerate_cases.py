"""Accelerate's loop of docs/library.md: accumulated, saved and loaded, on one process or as one rank of several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from loqt_scale import MergeCoordinator, attach, convert_to_loqt, muon
from loqt_scale.strategies import packed_bytes_may_be_sharded
from tests.distributed.trainer_tasks import one_accelerator
from tests.integration.trainer_cases import CONFIG, Progressions, has_trained, state_of, tiny_llama

STEPS, SAVED, PASSES, ROWS = 11, 5, 2, 4  # step 5, with which a loaded run goes on, ends in a merge


def reset() -> None:
    """Lets the next Accelerator of this process be another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A model, its optimizer and merges under Accelerate; without an accelerator the same by hand.

    Args:
        accelerator: Of this process.
        seed: Of the model.
        by_muon: Whether our Muon trains it, not torch's AdamW.
    """

    def __init__(self, accelerator: Accelerator | None, seed: int = 0, *, by_muon: bool = False) -> None:
        self.accelerator, ranks = accelerator, 1 if accelerator is None else accelerator.num_processes
        self.inner: nn.Module = tiny_llama(seed)
        before = self.inner.state_dict()
        convert_to_loqt(self.inner, CONFIG)
        trained = [p for p in self.inner.parameters() if p.requires_grad]
        parts: Any = self.inner, muon(self.inner, lr=1e-2) if by_muon else torch.optim.AdamW(trained, lr=1e-2)
        self.loader: Any = torch.utils.data.DataLoader(Progressions(), batch_size=ROWS // ranks)
        if accelerator is not None:
            with packed_bytes_may_be_sharded():
                *parts, self.loader = accelerator.prepare(*parts, self.loader)
        self.model, self.optimizer = parts
        self.merges: MergeCoordinator = attach(self.model, self.optimizer, CONFIG, initial_weights=before)
        self.losses: list[float] = []
        if accelerator is not None:
            accelerator.register_for_checkpointing(self.merges)

    def batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from list(self.loader)[first:]
            first = 0

    def steps(self, start: int, stop: int) -> None:
        batches = self.batches(start * PASSES)
        for _ in range(start, stop):
            (self.by_hand if self.accelerator is None else self.accumulated)([next(batches) for _ in range(PASSES)])

    def by_hand(self, batches: list[dict[str, Tensor]]) -> None:
        self.merges.prepare()
        for batch in batches:
            loss = self.model(**batch).loss
            (loss / PASSES).backward()
            self.losses.append(loss.item())
        self.optimizer.step()
        self.merges.finish()
        self.optimizer.zero_grad()

    def accumulated(self, batches: list[dict[str, Tensor]]) -> None:
        assert self.accelerator is not None
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                self.merges.prepare()
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.merges.finish()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())


def saved_and_loaded(folder: str, *, sharded: bool = False, by_muon: bool = False) -> dict[str, Any]:
    """Losses of a whole run, whether one that was loaded in its middle ends alike, and what was found. Every rank."""
    reset()
    with one_accelerator("fsdp" if sharded else ""):
        whole = Run(_accelerator(sharded), by_muon=by_muon)
        whole.steps(0, SAVED)
        whole.accelerator.save_state(folder)  # type: ignore[union-attr]
        whole.steps(SAVED, STEPS)
        other = Run(_accelerator(sharded), seed=7, by_muon=by_muon)
        other.accelerator.load_state(folder)  # type: ignore[union-attr]
        other.steps(SAVED, STEPS)
        ours = state_of(whole.inner)
        return {
            "losses": whole.losses,
            "again": other.losses == whole.losses[SAVED * PASSES :]
            and all(torch.equal(_local(tensor), _local(ours[name])) for name, tensor in state_of(other.inner).items()),
            "found": whole.merges.description,
            "steps": whole.merges.steps,
            "trained": sharded or has_trained(whole.inner),
        }


def _accelerator(sharded: bool) -> Accelerator:
    if not sharded:
        return Accelerator(cpu=True, gradient_accumulation_steps=PASSES)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return Accelerator(gradient_accumulation_steps=PASSES, fsdp_plugin=plugin)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
