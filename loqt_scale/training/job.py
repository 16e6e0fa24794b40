"""One training job on this rank, from settings to summary.

    settings -> launcher -> strategy -> lock, where it starts -> corpus, model design -> run folder -> Trainer

Whatever can be wrong is found in this order; nothing is allocated, moved or overwritten before the run folder's turn.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from loqt_scale.checkpoint import (
    Checkpoint,
    Start,
    check_numbers,
    check_tensors,
    identity,
    open_checkpoint,
    seek_text,
)
from loqt_scale.config import OptimConfig, RunConfig, TrainConfig
from loqt_scale.config.combinations import check_ranks
from loqt_scale.config.yaml import dump_run_config
from loqt_scale.data import Corpus, build_corpus
from loqt_scale.data.tokenizers import check_ids
from loqt_scale.functional.shares import micro_steps
from loqt_scale.metrics import Console, MetricsWriter, Progress, check_wandb
from loqt_scale.model.build import ModelDesign, design_model
from loqt_scale.optim import momentum_only
from loqt_scale.process.environment import launched_world_size
from loqt_scale.process.error_log import keep_errors_in
from loqt_scale.process.launcher import join_launcher
from loqt_scale.process.streams import warnings_of
from loqt_scale.strategies import (
    Comm,
    Store,
    Strategy,
    create_strategy,
    resolve_device,
    resolve_strategy,
)
from loqt_scale.training.agreement import check_same
from loqt_scale.training.messages import already_finished, banner, summary
from loqt_scale.training.opening import OpenRun
from loqt_scale.training.restart import restore
from loqt_scale.training.stopping import StopRequest
from loqt_scale.training.together import one_for_all
from loqt_scale.training.trainer import Trainer


def train(config: RunConfig, stop: StopRequest | None = None) -> dict[str, float]:
    """Runs one training job on this rank; every rank of the job calls it. A run that is over is not repeated.

    Args:
        config: The run.
        stop: Hears of signals already; default: they are heard of from here on, in the main thread.

    Returns:
        `eval/loss_before` and `eval/loss_after`, held-out, in nats.

    Raises:
        ValueError: Settings that cannot work, before anything is allocated.
        RunInUse: Another job works in the run's folder.
        NonFiniteLossError: Too many steps in a row had a gradient that was not finite.
        UnreadableDataError: A rank could not read its share of a step; the run has been saved.
        LostRankError: Another rank is missing or has ended; which one, where, and why if it is known.
        CheckpointError: A checkpoint cannot be used; or, at the end, the trained model could not be saved.
        Stopped: A signal asked for it; the run has been saved if there was something to save.
    """
    join_launcher()
    with nullcontext(stop) if stop is not None else StopRequest() as listening:
        if launched_world_size() == 1:
            return _train(config, listening, store=None)
        with one_for_all(config.parallel.timeout_seconds) as roll:
            return _train(config, listening, store=roll.store)


def _train(config: RunConfig, stop: StopRequest, *, store: Store | None) -> dict[str, float]:
    stop.check()  # while this module was loaded
    check_wandb(config.metrics)
    resolve_strategy(config.parallel)
    device = resolve_device(config.train.device)
    strategy = create_strategy(config, device=device, store=store)
    try:
        check_same(strategy.comm, dump_run_config(config).splitlines())
        check_ranks(config, ranks=strategy.step.data_size, passes=_passes(config.train, strategy))
        with OpenRun(config, strategy.comm, tell=_say) as run:
            check_same(strategy.comm, [f"goes on from: {_place(run.start)}"])
            before, after = _train_in(run, config, strategy, stop)
        return {"eval/loss_before": before, "eval/loss_after": after}
    finally:
        strategy.close()


def _train_in(run: OpenRun, config: RunConfig, strategy: Strategy, stop: StopRequest) -> tuple[float, float]:
    start = run.start
    if start.finished is not None:
        if strategy.comm.is_main:
            for line in (*start.notes, already_finished(config.train.run_dir, start.finished)):
                _say(line)
        return start.finished.loss_before, start.finished.loss_after
    checkpoint = None if start.checkpoint is None else open_checkpoint(start.checkpoint, strategy.comm)
    corpus = build_corpus(config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size)
    check_same(strategy.comm, corpus.fingerprint)
    if config.model.path is not None and config.model.weights == "pretrained":
        check_ids(corpus.tokenizer, config.model.path)
    with warnings_of(strategy.comm.is_main):
        design = design_model(config, vocab_size=corpus.tokenizer.vocab_size, occurring=corpus.occurring)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, design, corpus, config.optim, strategy.comm)
    with stop.patience():  # what has been moved is said, whatever signal comes
        run.prepare()  # only now, when the settings have proved to fit, is an older run in this folder moved aside
    stop.check()
    if checkpoint is not None and run.place is not None:
        checkpoint.follow(run.place)
    keep_errors_in(config.train.run_dir)
    before, after = _train_design(design, corpus, checkpoint, config, strategy, stop)
    run.finish(before, after)
    return before, after


def _check_checkpoint(
    checkpoint: Checkpoint, design: ModelDesign, corpus: Corpus, optim: OptimConfig, comm: Comm
) -> None:
    """Whether a run can go on from a checkpoint, before its folder is changed; goes to its place in the text."""
    single = momentum_only(design.model, optim, design.dense_layers)
    check_tensors(checkpoint, design.model, moments=True, momentum_only=single)
    seek_text(checkpoint, corpus.train)
    check_numbers(checkpoint, design.model, comm)


def _train_design(
    design: ModelDesign,
    corpus: Corpus,
    checkpoint: Checkpoint | None,
    config: RunConfig,
    strategy: Strategy,
    stop: StopRequest,
) -> tuple[float, float]:
    """Builds and trains a model; returns held-out loss before and after, in nats. Every rank."""
    train, done = config.train, None if checkpoint is None else checkpoint.manifest.step
    resumed: dict[str, Any] = {"resume_step": done, "evaluates_again": done == train.steps}
    with (
        Progress(train.steps, enabled=strategy.comm.is_main, mode=train.progress, initial_step=done or 0) as progress,
        MetricsWriter(train.run_dir, strategy.comm.is_main, settings=config, tell=progress.line, **resumed) as writer,
    ):
        trainer = Trainer(config, corpus, design, strategy=strategy, progress=progress, writer=writer, stop=stop)
        if strategy.comm.is_main:
            for name, text in strategy.run_files().items():
                (Path(train.run_dir) / name).write_text(text)
        began = None if checkpoint is None else checkpoint.manifest.warmup_steps
        progress.line(banner(trainer.built, trainer.corpus, config, strategy, warmup_steps=began))
        if checkpoint is not None:
            restore(trainer, checkpoint)
        before, after = trainer.run()
        writer.succeed(trainer.done)
        progress.close()
        progress.line(summary(train.run_dir, before, after))
    return before, after


def _say(line: str) -> None:
    Console().line(line)


def _passes(train: TrainConfig, strategy: Strategy) -> int:
    return micro_steps(train.global_batch_size, strategy.step.data_size, train.micro_batch_size)


def _place(start: Start) -> str:
    """Where a run starts, as this rank sees it."""
    if start.checkpoint is None:
        return "nothing"
    try:
        return f"{start.checkpoint} ({identity(start.checkpoint)[:12]})"
    except OSError:
        return f"{start.checkpoint} (not there)"
