"""What of a run is written down besides its results: a profile of some steps, a copy of its numbers for W&B."""

from __future__ import annotations

from dataclasses import dataclass

from loqt_scale.config.check import check_values, require


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A window of steps that torch.profiler records.

    Args:
        start: First step that is recorded, counted from 1 as in metrics.jsonl.
        steps: How many are recorded; 0 = none.
    """

    start: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        check_values(self, "train.profile")
        require(self.start >= 1, f"train.profile.start is {self.start}; write 1 (the first step) or more")
        require(self.steps >= 0, f"train.profile.steps is {self.steps}; write 0 (off) or more")

    def check_within(self, steps: int) -> None:
        """Raises ConfigError if the window reaches beyond the end of a run of so many steps."""
        last = self.start + self.steps - 1
        require(
            self.steps == 0 or last <= steps,
            f"train.profile records steps {self.start} to {last}, but train.steps is {steps}; write a smaller "
            "train.profile.start or train.profile.steps, or a larger train.steps",
        )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where a run's numbers go besides metrics.jsonl and TensorBoard.

    Args:
        wandb: Send them to Weights & Biases, too (pip install 'loqt-scale[wandb]'; WANDB_MODE=offline keeps them here).
        wandb_project: Project of the run there.
        wandb_name: Name of the run there. Default: that of the run's folder.
    """

    wandb: bool = False
    wandb_project: str = "loqt-scale"
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        check_values(self, "metrics")
        require(self.wandb_project != "", "metrics.wandb_project is empty; write a name, or leave it out")
        require(self.wandb_name != "", "metrics.wandb_name is empty; write a name, or null")
