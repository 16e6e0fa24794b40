"""One run: all groups together. What must hold between them: `combinations`."""

from __future__ import annotations

from dataclasses import dataclass, field

from loqt_scale.config.check import check_values
from loqt_scale.config.choices import Method
from loqt_scale.config.combinations import check_combinations
from loqt_scale.config.data import DataConfig
from loqt_scale.config.groups import (
    CheckpointConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from loqt_scale.config.method import LoQTConfig
from loqt_scale.config.metrics import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        method: loqt = low-rank factors over a quantized base; full = ordinary full-rank training of the same model.
        model: Which model.
        data: Which text.
        loqt: The method's settings (ignored under `method: full`).
        optim: Optimizer and schedule.
        parallel: How the run is spread over ranks.
        train: The loop.
        checkpoint: What is kept, and where it goes on.
        metrics: Where its numbers go.
    """

    method: Method = "loqt"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loqt: LoQTConfig = field(default_factory=LoQTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        check_values(self)
        check_combinations(self)

    @property
    def streams_updates(self) -> bool:
        """Whether the optimizer takes a parameter, or a few, at a time: to save memory, and for Muon."""
        optim = self.optim
        saves = optim.states == "int8" or optim.per_layer or self.model.trained_dtype == "bfloat16"
        return saves or optim.name == "muon"
