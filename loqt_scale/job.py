"""One training job on this rank, from settings to summary.

    settings -> launcher -> checkpoint to go on from? -> strategy -> corpus, model design -> run folder -> Trainer

Whatever can be wrong is found in this order; nothing is allocated, moved or overwritten before the run folder's turn.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

from loqt_scale.batching import micro_steps
from loqt_scale.build import design_model
from loqt_scale.checkpoint import check_tensors, find_resume, open_checkpoint
from loqt_scale.config import RunConfig
from loqt_scale.config_io import dump_run_config, save_run_config
from loqt_scale.data import build_corpus
from loqt_scale.launcher import join_launcher
from loqt_scale.metrics import MetricsWriter, Progress
from loqt_scale.report import banner, summary
from loqt_scale.rundir import prepare_run_dir
from loqt_scale.strategies import Strategy, create_strategy, resolve_device, resolve_strategy
from loqt_scale.trainer import Trainer


def train(config: RunConfig) -> dict[str, float]:
    """Runs one training job on this rank; every rank of the job calls it.

    Returns:
        `eval/loss_before` and `eval/loss_after`, held-out, in nats.

    Raises:
        ValueError: Settings that cannot work, before anything is allocated.
        NonFiniteLossError: Too many steps in a row had a gradient that was not finite.
        Stopped: A signal asked for it; the run has been saved.
    """
    join_launcher()
    resolve_strategy(config.parallel)
    device = resolve_device(config.train.device)
    resume = find_resume(config)
    strategy = create_strategy(config, device=device)
    try:
        _check_agreement(strategy, config, resume)
        _check_per_layer(config, strategy)
        checkpoint = None if resume is None else open_checkpoint(resume, strategy)
        corpus = build_corpus(config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size)
        design = design_model(config, vocab_size=corpus.tokenizer.vocab_size)
        if checkpoint is not None:
            check_tensors(checkpoint, design.model, Strategy(device), moments=True)
        # only now, when the settings have proved to fit, is an older run in this folder moved aside
        if strategy.is_main:
            run_dir = Path(config.train.run_dir)
            going_on = resume is not None and resume.resolve().is_relative_to(run_dir.resolve())
            prepare_run_dir(run_dir, "keep" if going_on else config.train.on_existing_run)
            save_run_config(config, run_dir / "config.yaml")
        strategy.barrier()
        resume_step = None if checkpoint is None else checkpoint.manifest.step
        with (
            MetricsWriter(config.train.run_dir, strategy.is_main, resume_step=resume_step) as writer,
            Progress(config.train.steps, enabled=strategy.is_main, mode=config.train.progress) as progress,
        ):
            trainer = Trainer(config, corpus, design, strategy=strategy, progress=progress, writer=writer)
            if strategy.is_main and strategy.engine_settings is not None:
                (run_dir / "deepspeed.json").write_text(json.dumps(strategy.engine_settings, indent=2) + "\n")
            progress.line(banner(trainer.built, trainer.corpus, config, strategy))
            if checkpoint is not None:
                trainer.restore(checkpoint)
            before, after = trainer.run()
            progress.close()
        if strategy.is_main:
            print(summary(config, before, after), flush=True)
        return {"eval/loss_before": before, "eval/loss_after": after}
    finally:
        strategy.close()


def _check_per_layer(config: RunConfig, strategy: Strategy) -> None:
    train = config.train
    steps = micro_steps(train.global_batch_size, strategy.world_size, train.micro_batch_size)
    if config.optim.per_layer and steps > 1:
        share = -(-train.global_batch_size // strategy.world_size)
        raise ValueError(
            f"optim.per_layer is true, but a step is {steps} micro-batches, whose gradients would have to pile up; "
            f"write train.micro_batch_size: {share}, a smaller train.global_batch_size, or optim.per_layer: false"
        )


def _check_agreement(strategy: Strategy, config: RunConfig, resume: Path | None) -> None:
    """Ranks with other settings, or another place to go on from, would wait for one another for ever. Every rank."""
    lines = [*dump_run_config(config).splitlines(), f"goes on from: {resume}"]
    everyone = strategy.gather_objects(lines)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip_longest(everyone[0], theirs, fillvalue="nothing")
            first, other = next((a.strip(), b.strip()) for a, b in pairs if a != b)
            raise ValueError(
                f"rank 0 has {first!r}, rank {rank} has {other!r}; start all ranks with the same settings, and with "
                "the run folder on a disk that all of them see"
            )
