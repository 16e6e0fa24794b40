"""What to change so that a run fits: settings that save memory, the least painful first, until it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loqt_scale.config import Kept, RunConfig
from loqt_scale.config.blocks import row_block
from loqt_scale.functional.shares import micro_steps

KEPT = "--parallel.kept_between_passes"


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
    kept = config.parallel.kept_between_passes
    for step in (
        _checkpointing,
        _small_states,
        _bfloat16,
        _double,
        _smaller_passes,
        _nothing_kept,
        _per_layer,
        _smaller_steps,
        _offload,
        _rank,
    ):
        while (found := step(config, ranks)) is not None:
            config, said = found
            words = _said(words, said)
            if step is _per_layer:  # one pass: there is no between
                config = replace(config, parallel=replace(config.parallel, kept_between_passes=kept))
                words = tuple(word for word in words if not word.startswith(KEPT))
            yield Change(config, words)


def first_that_fits(config: RunConfig, *, ranks: int, fits: Callable[[RunConfig], bool]) -> Change | None:
    """The first of `changes` with which the run fits, with as large passes as fit then; None if none does."""
    most = min(config.train.micro_batch_size, -(-config.train.global_batch_size // ranks))
    for change in changes(config, ranks=ranks):
        if fits(change.config):
            while change.config.train.micro_batch_size < most:
                resize = _one_pass if change.config.optim.per_layer else _passes_of
                larger, said = resize(change.config, 2 * change.config.train.micro_batch_size, ranks)
                if not fits(larger):
                    break
                change = Change(larger, _said(change.words, said))
            return change
    return None


def _said(words: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """Words with some added; a later value of the same setting replaces an earlier one."""
    given = {word.partition("=")[0] for word in more}
    return (*(word for word in words if word.partition("=")[0] not in given), *more)


Found = tuple[RunConfig, tuple[str, ...]] | None


def _checkpointing(config: RunConfig, ranks: int) -> Found:
    if config.model.activation_checkpointing:
        return None
    model = replace(config.model, activation_checkpointing=True)
    return replace(config, model=model), ("--model.activation_checkpointing=true",)


def _small_states(config: RunConfig, ranks: int) -> Found:
    if config.optim.states == "int8" or (config.method == "loqt" and not all(map(row_block, config.loqt.ranks))):
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


def _smaller_passes(config: RunConfig, ranks: int) -> Found:
    """The same step in more passes."""
    size = min(config.train.micro_batch_size, -(-config.train.global_batch_size // ranks))
    return None if size == 1 or config.optim.per_layer else _passes_of(config, size // 2, ranks)


def _nothing_kept(config: RunConfig, ranks: int) -> Found:
    """Of several passes' gradients 1/N; of one pass's B, which `trained` keeps gathered all through it."""
    parallel, train = config.parallel, config.train
    one_pass = micro_steps(train.global_batch_size, ranks, train.micro_batch_size) == 1
    less: Kept = "gradients" if one_pass else "nothing"
    if ranks == 1 or parallel.strategy not in ("auto", "fsdp") or parallel.kept_between_passes in ("nothing", less):
        return None
    return replace(config, parallel=replace(parallel, kept_between_passes=less)), (f"{KEPT}={less}",)


def _per_layer(config: RunConfig, ranks: int) -> Found:
    """A step of one pass, because gradients of several would have to pile up."""
    if config.optim.per_layer or config.parallel.strategy in ("ddp", "zero"):
        return None
    config = replace(config, optim=replace(config.optim, per_layer=True, clip_norm=0.0))
    config, said = _one_pass(config, config.train.micro_batch_size, ranks)
    return config, ("--optim.per_layer=true", "--optim.clip_norm=0", *said)


def _smaller_steps(config: RunConfig, ranks: int) -> Found:
    size = config.train.micro_batch_size
    return None if size == 1 or not config.optim.per_layer else _one_pass(config, size // 2, ranks)


def _offload(config: RunConfig, ranks: int) -> Found:
    if ranks > 1 or config.method != "loqt" or config.parallel.offload != "none":
        return None
    return replace(config, parallel=replace(config.parallel, offload="base")), ("--parallel.offload=base",)


def _passes_of(config: RunConfig, size: int, ranks: int) -> tuple[RunConfig, tuple[str, ...]]:
    return replace(config, train=replace(config.train, micro_batch_size=size)), (f"--train.micro_batch_size={size}",)


def _one_pass(config: RunConfig, size: int, ranks: int) -> tuple[RunConfig, tuple[str, ...]]:
    train = replace(config.train, micro_batch_size=size, global_batch_size=size * ranks)
    said = (f"--train.micro_batch_size={size}", f"--train.global_batch_size={size * ranks}")
    return replace(config, train=train), said


def _rank(config: RunConfig, ranks: int) -> Found:
    """About half the rank, a multiple of 32 as 8-bit states want it."""
    if config.method != "loqt" or config.loqt.rank < 128:
        return None
    rank = config.loqt.rank // 64 * 32
    return replace(config, loqt=replace(config.loqt, rank=rank)), (f"--loqt.rank={rank}",)
