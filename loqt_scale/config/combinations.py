"""Settings of several groups that cannot work together. What one group can judge alone it judges itself (`groups`).

    check_combinations    whatever the number of ranks    when a `RunConfig` is made
    check_ranks           for so many ranks               before anything of a run is touched
    strategy_of           what `auto` means for so many   where a run starts, and where it is planned

What depends on the model's shapes, on files or on the machine is judged where they are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loqt_scale.config.blocks import row_block
from loqt_scale.config.check import require

if TYPE_CHECKING:
    from loqt_scale.config.groups import ParallelConfig
    from loqt_scale.config.run import RunConfig


def check_combinations(config: RunConfig) -> None:
    """Raises ConfigError if two settings contradict each other."""
    batch, streams = config.train.global_batch_size, config.data.streams
    require(
        streams is None or batch % streams == 0,
        f"data.streams is {streams}, which does not divide train.global_batch_size {batch}; write one of "
        f"{', '.join(str(count) for count in range(1, min(batch, 1024) + 1) if batch % count == 0)}, or null",
    )
    uneven = next((rank for rank in config.loqt.ranks if not row_block(rank)), 0)
    ours_alone = {
        "optim.per_layer: true": config.optim.per_layer,
        "model.trained_dtype: bfloat16": config.model.trained_dtype == "bfloat16",
    }
    asked = [name for name, wanted in ours_alone.items() if wanted]
    require(
        config.parallel.strategy != "zero" or not asked,
        f"{', '.join(asked)}: DeepSpeed's ZeRO keeps float32 masters of what trains and updates them at the end of "
        "a step; write parallel.strategy: fsdp (or single), or leave it out",
    )
    require(
        not (config.optim.per_layer and config.parallel.strategy == "ddp"),
        "optim.per_layer is true, but ddp sums gradients in buckets that hold all of them; write "
        "parallel.strategy: fsdp, or optim.per_layer: false",
    )
    require(
        not (config.optim.per_layer and config.parallel.offload in ("optimizer", "all")),
        "optim.per_layer is true, but gradients are on their way to host memory then; write parallel.offload: "
        "base, or optim.per_layer: false",
    )
    require(
        config.streams_updates or not config.optim.compile,
        "optim.compile is true, but these settings take torch's fused AdamW, which is one kernel as it is; write "
        "optim.compile: false (streamed are the updates of optim.name: muon, optim.states: int8, optim.per_layer: true "
        "and model.trained_dtype: bfloat16)",
    )
    require(
        not (config.method == "full" and config.parallel.offload == "base"),
        "parallel.offload is base, but full-rank training has no frozen base; write parallel.offload: optimizer",
    )
    require(
        not (config.optim.states == "int8" and config.method == "loqt" and uneven),
        "optim.states is int8, whose blocks are parts of a row, but loqt.rank "
        f"{'(by loqt.rank_pattern) ' if row_block(config.loqt.rank) else ''}is {uneven}; write a "
        "rank from 32 to 256, a multiple of 32, or optim.states: float32",
    )


def check_ranks(config: RunConfig, *, ranks: int, passes: int) -> None:
    """Raises ConfigError if settings cannot work on so many ranks.

    Args:
        config: The run.
        ranks: N.
        passes: Micro-batches of a step on each of them.
    """
    check_shard_size(config.parallel.shard_size, ranks)
    share = -(-config.train.global_batch_size // ranks)
    require(
        not (config.optim.per_layer and passes > 1),
        f"optim.per_layer is true, but a step is {passes} micro-batches, whose gradients would have to pile up; "
        f"write train.micro_batch_size: {share}, a smaller train.global_batch_size, or optim.per_layer: false",
    )


def check_shard_size(size: int | None, ranks: int) -> None:
    """Raises ConfigError if so many ranks are no groups of `parallel.shard_size`."""
    sizes = ", ".join(str(other) for other in range(2, ranks + 1) if ranks % other == 0)
    require(
        size is None or ranks % size == 0,
        f"parallel.shard_size is {size}, which does not divide {ranks} rank(s); "
        f"{f'write one of {sizes}, or ' if sizes else ''}leave it out",
    )


def strategy_of(parallel: ParallelConfig, ranks: int) -> str:
    """The strategy of a run on so many ranks: `auto` is fsdp on several, single on one."""
    if parallel.strategy != "auto":
        return parallel.strategy
    return "fsdp" if ranks > 1 else "single"
