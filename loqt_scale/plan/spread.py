"""How a planned run is spread over ranks, in the words of `strategies`."""

from __future__ import annotations

from dataclasses import dataclass

from loqt_scale.config import ParallelConfig
from loqt_scale.config.combinations import check_shard_size, strategy_of
from loqt_scale.config.strategy_names import check_strategy_name
from loqt_scale.errors import ConfigError


@dataclass(frozen=True)
class Spread:
    """What a plan must know of a strategy.

    Args:
        strategy: single, ddp, fsdp or zero.
        ranks: GPUs.
        data_size: Ranks that share out a batch's sequences.
        shard_size: Ranks that together store each parameter once.
        update_size: Ranks that share out the update of a parameter.
        work_size: Ranks that share out a merge's rows.
        zero_stage: 1, 2 or 3 under zero, else 0.
    """

    strategy: str
    ranks: int
    data_size: int
    shard_size: int
    update_size: int
    work_size: int
    zero_stage: int = 0

    @property
    def replicas(self) -> int:
        """Copies of a sharded model (HSDP); 1: there is one, or it is not sharded."""
        return self.ranks // self.shard_size if self.shard_size > 1 else 1


def planned_spread(parallel: ParallelConfig, sequences: int, ranks: int) -> Spread:
    """How a run of so many ranks is spread.

    Args:
        parallel: Its strategy.
        sequences: Of a global batch.
        ranks: GPUs.

    Raises:
        ConfigError: The strategy is not planned, or not for so many ranks.
    """
    name = strategy_of(parallel, ranks)
    if ranks > sequences:
        raise ConfigError(
            f"--gpus is {ranks}, but a batch has {sequences} sequence(s), so that some would have none; write --gpus "
            f"{sequences}, or train.global_batch_size: {ranks}"
        )
    check_strategy_name(name)
    if name not in ("single", "ddp", "fsdp", "zero"):
        raise ConfigError(f"parallel.strategy is '{name}', which plan does not know; write parallel.strategy: fsdp")
    parallel.check_offload(name)
    if name == "single" and ranks > 1:
        raise ConfigError(f"parallel.strategy is 'single', but --gpus is {ranks}; write --gpus 1, or leave it out")
    check_shard_size(parallel.shard_size, ranks)
    rows, stage = parallel.shard_size or ranks, _zero_stage(parallel) if name == "zero" else 0
    cut = rows if name == "fsdp" or stage == 3 else 1
    update = 1 if name in ("single", "ddp") else rows
    return Spread(name, ranks, data_size=ranks, shard_size=cut, update_size=update, work_size=rows, zero_stage=stage)


def _zero_stage(parallel: ParallelConfig) -> int:
    """The stage; raises ConfigError for what is not planned."""
    for name in ("zero_config", "zero_offload"):
        value = getattr(parallel, name)
        if value not in (None, "none"):
            raise ConfigError(
                f"parallel.{name} is '{value}', which plan does not know; leave it out, and write parallel.zero_stage"
            )
    return parallel.zero_stage or 3
