"""One run: all groups together, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from loqt_scale.config.check import require
from loqt_scale.config.choices import Method
from loqt_scale.config.groups import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from loqt_scale.config.method import LoQTConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        method: loqt = low-rank factors over a quantized base; full = ordinary full-rank training of the same model.
        model: Which model.
        data: Which text.
        loqt: The method's settings (ignored under `--method full`).
        optim: Optimizer and schedule.
        parallel: How the run is spread over ranks.
        train: The loop.
        checkpoint: What is kept, and where it goes on.
    """

    method: Method = "loqt"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loqt: LoQTConfig = field(default_factory=LoQTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        self._check_small_states()

    @property
    def streams_updates(self) -> bool:
        """Whether the optimizer takes a parameter, or a few, at a time: to save memory, and for Muon."""
        optim = self.optim
        saves = optim.states == "int8" or optim.per_layer or self.model.trained_dtype == "bfloat16"
        return saves or optim.name == "muon"

    def _check_small_states(self) -> None:
        uneven = next((rank for rank in self.loqt.ranks if rank % 32), 0)
        ours_alone = {
            "optim.per_layer: true": self.optim.per_layer,
            "model.trained_dtype: bfloat16": self.model.trained_dtype == "bfloat16",
        }
        asked = [name for name, wanted in ours_alone.items() if wanted]
        require(
            self.parallel.strategy != "zero" or not asked,
            f"{', '.join(asked)}: DeepSpeed's ZeRO keeps float32 masters of what trains and updates them at the end of "
            "a step; write parallel.strategy: fsdp (or single), or leave it out",
        )
        require(
            not (self.optim.per_layer and self.parallel.strategy == "ddp"),
            "optim.per_layer is true, but ddp sums gradients in buckets that hold all of them; write "
            "parallel.strategy: fsdp, or optim.per_layer: false",
        )
        require(
            not (self.optim.per_layer and self.parallel.offload in ("optimizer", "all")),
            "optim.per_layer is true, but gradients are on their way to host memory then; write parallel.offload: "
            "base, or optim.per_layer: false",
        )
        require(
            not (self.method == "full" and self.parallel.offload == "base"),
            "parallel.offload is base, but full-rank training has no frozen base; write parallel.offload: optimizer",
        )
        require(
            not (self.optim.states == "int8" and self.method == "loqt" and uneven),
            "optim.states is int8, whose blocks are parts of a row, but loqt.rank "
            f"{'' if self.loqt.rank % 32 else '(by loqt.rank_pattern) '}is {uneven}; write a "
            "multiple of 32, or optim.states: float32",
        )
