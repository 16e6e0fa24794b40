"""How a planned run is spread over ranks, in the words of `strategies`."""

from __future__ import annotations

from dataclasses import dataclass

from loqt_scale.config import RunConfig
from loqt_scale.config.combinations import check_shard_size, strategy_of
from loqt_scale.config.names import check_strategy_name
from loqt_scale.errors import ConfigError
from loqt_scale.plan.zero import zero_stage


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
    """

    strategy: str
    ranks: int
    data_size: int
    shard_size: int
    update_size: int
    work_size: int

    @property
    def replicas(self) -> int:
        """Copies of a sharded model (HSDP); 1: there is one, or it is not sharded."""
        return self.ranks // self.shard_size if self.shard_size > 1 else 1


def planned_spread(config: RunConfig, ranks: int) -> Spread:
    """How a run of so many ranks is spread; raises ConfigError if its strategy is not planned."""
    name = strategy_of(config.parallel, ranks)
    sequences = config.train.global_batch_size
    if ranks > sequences:
        raise ConfigError(
            f"--gpus is {ranks}, but a batch has {sequences} sequence(s), so that some would have none; write --gpus "
            f"{sequences}, or --train.global_batch_size {ranks}"
        )
    check_strategy_name(name)
    if name not in ("single", "ddp", "fsdp", "zero"):
        raise ConfigError(f"parallel.strategy is '{name}', which plan does not know; write --parallel.strategy fsdp")
    config.parallel.check_offload(name)
    if name == "single" and ranks > 1:
        raise ConfigError(f"parallel.strategy is 'single', but --gpus is {ranks}; write --gpus 1, or leave it out")
    check_shard_size(config.parallel.shard_size, ranks)
    rows = config.parallel.shard_size or ranks
    cut = rows if name == "fsdp" or (name == "zero" and zero_stage(config) == 3) else 1
    update = 1 if name in ("single", "ddp") else rows
    return Spread(name, ranks, data_size=ranks, shard_size=cut, update_size=update, work_size=rows)
