"""What to change so that a run fits: settings that save memory, the least painful first, until it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loqt_scale.config import RunConfig


@dataclass(frozen=True)
class Change:
    """A step towards less memory.

    Args:
        config: The run with it (and with those before it).
        words: What to write, as on the command line.
    """

    config: RunConfig
    words: tuple[str, ...]


def changes(config: RunConfig, *, ranks: int) -> Iterator[Change]:
    """Changes that add up, the least painful first; each only where it is one."""
    words: tuple[str, ...] = ()
    for step in (_checkpointing, _small_states, _bfloat16, _double, _micro_batch, _per_layer, _micro_batch, _rank):
        while True:
            found = step(config, ranks)
            if found is None:
                break
            config, said = found
            given = {word.split("=")[0] for word in said}
            words = (*(word for word in words if word.split("=")[0] not in given), *said)
            yield Change(config, words)


Found = tuple[RunConfig, tuple[str, ...]] | None


def _checkpointing(config: RunConfig, ranks: int) -> Found:
    if config.model.activation_checkpointing:
        return None
    model = replace(config.model, activation_checkpointing=True)
    return replace(config, model=model), ("--model.activation_checkpointing=true",)


def _small_states(config: RunConfig, ranks: int) -> Found:
    if config.optim.states == "int8" or (config.method == "loqt" and config.loqt.rank % 32):
        return None
    return replace(config, optim=replace(config.optim, states="int8")), ("--optim.states=int8",)


def _bfloat16(config: RunConfig, ranks: int) -> Found:
    if config.model.trained_dtype == "bfloat16":
        return None
    model = replace(config.model, dtype="bfloat16", trained_dtype="bfloat16")
    said = () if config.model.dtype == "bfloat16" else ("--model.dtype=bfloat16",)
    return replace(config, model=model), (*said, "--model.trained_dtype=bfloat16")


def _double(config: RunConfig, ranks: int) -> Found:
    quantization = config.loqt.quantization
    if config.method != "loqt" or quantization.weight == "nf4_double":
        return None
    loqt = replace(config.loqt, quantization=replace(quantization, weight="nf4_double", projection="nf4_double"))
    said = ("--loqt.quantization.weight=nf4_double", "--loqt.quantization.projection=nf4_double")
    return replace(config, loqt=loqt), said


def _micro_batch(config: RunConfig, ranks: int) -> Found:
    size = min(config.train.micro_batch_size, -(-config.train.global_batch_size // ranks))
    if size == 1 or config.optim.per_layer:
        return None
    train = replace(config.train, micro_batch_size=size // 2)
    return replace(config, train=train), (f"--train.micro_batch_size={size // 2}",)


def _per_layer(config: RunConfig, ranks: int) -> Found:
    """One micro-batch a step: the global batch becomes what one pass can take."""
    if config.optim.per_layer or config.parallel.strategy in ("ddp", "zero"):
        return None
    batch = config.train.micro_batch_size * ranks
    optim = replace(config.optim, per_layer=True, clip_norm=0.0)
    train = replace(config.train, global_batch_size=batch)
    said = ("--optim.per_layer=true", "--optim.clip_norm=0", f"--train.global_batch_size={batch}")
    return replace(config, optim=optim, train=train), said


def _rank(config: RunConfig, ranks: int) -> Found:
    if config.method != "loqt" or config.loqt.rank < 128:
        return None
    rank = config.loqt.rank // 2
    return replace(config, loqt=replace(config.loqt, rank=rank)), (f"--loqt.rank={rank}",)


def first_that_fits(config: RunConfig, *, ranks: int, fits: Callable[[RunConfig], bool]) -> Change | None:
    """The first of `changes` with which the run fits; None if none does."""
    return next((change for change in changes(config, ranks=ranks) if fits(change.config)), None)
