"""The training loop.

    share of the batch -> forward, backward (micro-steps) -> clip -> AdamW -> settle: merge, on merge steps; metrics

A step is settled when its numbers have reached the host, while the next one runs (see `pending`).
Faults have helpers beside this loop: `health` (what can be wrong with a step), `stopping` (signals), `rescue` (an error
is let go only when the run is saved), `checkpoint.saver` (a disk that takes nothing).
Whatever talks to other ranks goes through the strategy, whatever knows about subspaces through the MergeCoordinator.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from loqt_scale.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    DATA,
    FORMAT,
    HUGGINGFACE,
    Checkpoint,
    CheckpointError,
    CheckpointSaver,
    Manifest,
    load_checkpoint,
)
from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import save_run_config
from loqt_scale.data import Batch, Corpus
from loqt_scale.data.batching import counted_tokens, micro_batches, micro_steps, share, summed_loss
from loqt_scale.errors import one_line
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.merge import MergeCoordinator
from loqt_scale.metrics import MetricsWriter, Progress, RateMeter, memory_metrics, perplexity
from loqt_scale.metrics.wire_counter import WireCounter
from loqt_scale.model.architectures import portable_config
from loqt_scale.model.attention import attend_causally
from loqt_scale.model.build import ModelDesign, build_model
from loqt_scale.optim import (
    LearningRates,
    StreamedAdamW,
    UpdateInBackward,
    create_optimizer,
    set_schedule_position,
    set_update_count,
)
from loqt_scale.strategies import Strategy
from loqt_scale.training.diagnosis import Diagnosis, chance_overlaps
from loqt_scale.training.evaluation import evaluate
from loqt_scale.training.health import Health, StepPlace, UnreadableDataError, Words
from loqt_scale.training.messages import merge_line, start_line
from loqt_scale.training.pending import HostCopy, PendingStep
from loqt_scale.training.rescue import saved_first
from loqt_scale.training.stopping import Stopped, StopRequest


class Trainer:
    """One run on one rank.

    Args:
        config: The run.
        corpus: Its text.
        design: Its model, still on the meta device.
        strategy: How it is spread over ranks.
        progress: Where lines for people go.
        writer: Where numbers go.
        stop: Hears of signals; default: nobody does.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        design: ModelDesign,
        *,
        strategy: Strategy,
        progress: Progress,
        writer: MetricsWriter,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.strategy, self.progress, self.writer = config, strategy, progress, writer
        train = config.train
        self.corpus = corpus
        self.built = build_model(design, config.model, strategy)
        attend_causally(self.built.model, config.data.seq_len)
        self.parameters = [p for p in self.built.model.parameters() if p.requires_grad]
        self.optimizer = create_optimizer(
            self.built.model,
            config.optim,
            self.built.dense_layers,
            local=strategy.local,
            first_row=lambda parameter: strategy.stored_rows(parameter)[0],
            seed=train.seed,
            streamed=config.streams_updates,
            shards=strategy.row_shards,
        )
        self.model = strategy.wrap(self.built.model, self.optimizer)
        if config.model.trained_dtype == "bfloat16" and self.micro_steps > 1:
            strategy.sum_in_float32(self.parameters)
        self.per_layer: UpdateInBackward | None = None
        if config.optim.per_layer:
            assert isinstance(self.optimizer, StreamedAdamW)
            self.per_layer = UpdateInBackward(self.parameters, self.optimizer, strategy.local)
        ours = not strategy.schedules_learning_rate
        self.learning_rates = LearningRates.of_run(config.optim, train.steps)
        self.scheduler = LambdaLR(self.optimizer, lambda step: self.learning_rates.factor(step)) if ours else None
        self.merges = self._create_merges() if config.method == "loqt" else None
        self.diagnosis = Diagnosis(config, chance_overlaps(self.built.model), progress.line)
        self.rates = RateMeter()
        self.done = 0  # steps
        self.pending: PendingStep | None = None
        self.stop, self.stopping = stop or StopRequest(), False  # asked of this rank, agreed by all
        self.save_again = False  # agreed by all, after a save that failed
        self.data_fault: Exception | None = None  # why this rank cannot read its share of a step
        self.half_done: str | None = None  # what is changing the state, or was interrupted in it
        self.updates = 0  # steps that were not skipped
        self.counted: set[str] = set()  # whose bytes on the wire
        self.tokens = 0
        self.eval_before: float | None = None
        # what the backward pass has applied cannot be skipped any more: the first such step ends the run
        self.health = Health(1 if config.optim.per_layer else config.optim.max_skipped_steps)
        folder = Path(train.run_dir) / CHECKPOINTS
        self.saver = CheckpointSaver(
            folder, config.checkpoint, strategy, tell=progress.line, kept=self.learning_rates.branching_step
        )

    def _create_merges(self) -> MergeCoordinator:
        return MergeCoordinator(
            self.built.model,
            self.optimizer,
            self.config.loqt,
            total_steps=self.config.train.steps,
            strategy=self.strategy,
            seed=self.config.train.seed,
            initial_weights=self.built.initial_weights,
        )

    def run(self) -> tuple[float, float]:
        """Trains to the end, from where it stands; returns held-out loss before and after, in nats. Every rank.

        Raises:
            Stopped: A signal asked for it; the run has been saved.
            CheckpointError: The trained model could not be saved, at the end either.
        """
        if self.eval_before is None:
            self.begin()
            self.eval_before = self.evaluate(0)
        with self.stop.patience(), self.saver, saved_first(self):
            while self.done < self.config.train.steps:
                self.step(self.done)
                self.between_steps()
            self.save_if_unsaved()
            self.stop.doing = f"after step {self.done}, the last; {self.saver.way_on(self.done)}"
        self.stop.check()
        with saved_first(self):
            after = self.evaluate(self.done)
        self.save_if_unsaved()
        if self.saver.failure is not None:
            raise CheckpointError(f"{self.saver.failure}. Make room: {self.saver.way_on(self.done)}")
        return self.eval_before, after

    def begin(self) -> None:
        """What comes before the first step of a run that goes on from nothing. Every rank."""
        report = None if self.merges is None else self.merges.begin()
        if report is not None:
            self.progress.line(start_line(report))
            self.writer.log(0, {f"start/{key}": value for key, value in report.means().items()})

    def between_steps(self) -> None:
        """Evaluates and saves if it is time, and stops if that was asked for. Every rank.

        Raises:
            Stopped: The run has been saved.
        """
        train, every = self.config.train, self.config.checkpoint.every
        last = self.done == train.steps
        if train.eval_every and self.done % train.eval_every == 0 and not last:
            self.evaluate(self.done)
        due = every and (self.done % every == 0 or self.done == self.learning_rates.branching_step)
        if last or self.stopping or self.save_again or due:
            self.save()
        if self.stopping:
            self.saver.wait()
            self.progress.line(f"stopped after step {self.done}; {self.saver.way_on(self.done)}")
            signals = filter(None, self.strategy.gather_objects(self.stop.number))  # perhaps one rank alone was told
            raise Stopped(next(signals), together=True)

    def save_if_unsaved(self) -> None:
        """Waits for the last save, and makes one more try if it has failed. Every rank."""
        self.saver.wait()
        if self.saver.saved != self.done:
            self.save()
            self.saver.wait()

    def save(self, *, keep_all: bool = False) -> None:
        """Saves a checkpoint, or begins to; `keep_all` removes no older one for it. Every rank."""
        assert self.eval_before is not None
        self.settle()
        self.save_again = False
        manifest = Manifest(
            format=FORMAT,
            step=self.done,
            updates=self.updates,
            skipped_in_a_row=self.health.in_a_row,
            merge_is_due=self.merges is not None and self.merges.is_merge_step(self.done),
            tokens=self.tokens,
            warmup_steps=self.learning_rates.warmup_steps,
            eval_before=self.eval_before,
            world_size=self.strategy.world_size,
            strategy=self.strategy.description,
            tensors={},
        )
        with self.rates.paused():
            # of now: the documents are written later, while training reads on
            write = partial(self._write_documents, position=self.corpus.train.position(self.done))
            self.saver.save(manifest, write, self.built.model, self.optimizer, keep_all=keep_all)

    def _write_documents(self, folder: Path, *, position: dict[str, Any] | None) -> None:
        """What a checkpoint holds besides tensors: settings, data position, what makes a Hugging Face model of it."""
        save_run_config(self.config, folder / CONFIG)
        if position is not None:
            (folder / DATA).write_text(json.dumps(position) + "\n", encoding="utf-8")
        tokenizer = self.corpus.tokenizer
        portable = portable_config(self.built.hf_config, eos_token_id=tokenizer.eos_token_id)
        portable.save_pretrained(folder / HUGGINGFACE)
        tokenizer.save(folder / HUGGINGFACE)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a (verified) checkpoint was saved; its text stands there (`seek_text`). Every rank.

        Raises:
            CheckpointError: It is of another model, holds a number that is not finite, or has changed meanwhile.
        """
        manifest = checkpoint.manifest
        load_checkpoint(checkpoint, self.built.model, self.optimizer, self.strategy)
        set_update_count(self.optimizer, manifest.updates)
        self._keep_warmup(manifest.warmup_steps)
        if self.scheduler is not None:
            set_schedule_position(self.scheduler, manifest.step)
        self.strategy.set_schedule_position(manifest.updates)
        self.done, self.tokens, self.eval_before = manifest.step, manifest.tokens, manifest.eval_before
        self.updates, self.health.skipped = manifest.updates, manifest.step - manifest.updates
        self.health.in_a_row, self.saver.saved = manifest.skipped_in_a_row, manifest.step
        if self.merges is not None:
            self._expect_merges(self.merges, manifest)
        self.progress.line(
            f"resumed after step {self.done} from {checkpoint.path} (saved by {manifest.world_size} ranks)"
        )

    def _expect_merges(self, merges: MergeCoordinator, manifest: Manifest) -> None:
        if manifest.merge_is_due:
            merges.require(manifest.step)
        if manifest.updates == 0:  # the first update is followed by the first merge
            merges.expect_first_merge()

    def _keep_warmup(self, steps: int | None) -> None:
        """The warm-up of a run that goes on is the one with which it began, however long the run is by now."""
        train, optim = self.config.train, self.config.optim
        if steps not in (None, self.learning_rates.warmup_steps):
            self.progress.line(f"the warm-up stays as the run began: {steps} step{'' if steps == 1 else 's'}")
        self.learning_rates = LearningRates.of_run(optim, train.steps, warmup_steps=steps)
        self.saver.kept = self.learning_rates.branching_step

    def step(self, step: int) -> None:
        """One optimizer step, and the merge after it if there is one; settles the step before. Every rank."""
        place = self.place(step)
        if place.merging:
            self.settle()  # the step before announced this merge, whose collectives begin in the backward pass
        counter = None if place.merging else self._wire_counter("wire/step")
        with ExitStack() as stack:
            if counter is not None:
                stack.enter_context(counter)
            if self.merges is not None:
                self.merges.prepare(step, backward_passes=self.micro_steps)
            with self._changing("an update" if self.per_layer is not None else None):
                sums = self.accumulate(step)
            metrics = {f"train/lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
            with self._changing("an update"):
                norm = self.update()
        numbers = HostCopy(torch.cat([sums, norm.reshape(1).to(sums)]))
        self.done, self.tokens = step + 1, self.tokens + self.tokens_per_step
        metrics |= {"train/tokens": self.tokens, **self._wire_values("wire/step", counter)}
        before, self.pending = self.pending, PendingStep(place, numbers, metrics)
        self._settle(before)  # its numbers are there by now
        if place.merging:  # it must be known whether there is something to merge
            self.settle()
        if self.scheduler is not None:
            self.scheduler.step()
        self.rates.tick(self.tokens_per_step)

    def place(self, step: int) -> StepPlace:
        """Where this rank believes to be when it takes a step."""
        here, following = (self.merges is not None and self.merges.is_merge_step(s) for s in (step, step + 1))
        return StepPlace(step, merging=here, announcing=following)

    def settle(self) -> None:
        """Waits for the last step's numbers, if it has not been settled yet: judges, merges, reports. Every rank.

        Raises:
            OutOfStepError: Another rank was at another step, or disagrees on whether it ends in a merge.
            UnreadableDataError: A rank could not read its share of the step, which nobody has applied.
            NonFiniteLossError: The step was one too many in a row that could not be applied.
        """
        pending, self.pending = self.pending, None
        self._settle(pending)

    def _settle(self, pending: PendingStep | None) -> None:
        if pending is None:
            return
        loss, marks, told, norm = pending.numbers.values()
        words = Words.of_sum(told, self.strategy.world_size)
        step, merging = pending.place.step, pending.place.merging
        pending.place.check(marks, self.strategy.world_size)
        if words.faults:
            self._take_back(step)
        self.stopping, self.save_again = self.stopping or words.stops > 0, self.save_again or words.saves > 0
        values = {"train/loss": loss, "train/grad_norm": norm} | pending.metrics
        warning = self.health.judge(step + 1, loss, norm)
        if warning is None:
            self.updates += 1
            self.diagnosis.take_loss(loss)
            values |= self.merge(step) if merging else {}
        else:
            self.progress.line(f"WARNING: {warning}")
            if merging and self.merges is not None:
                self.merges.postpone(step)
        logged = (step + 1) % self.config.train.log_every == 0 or merging or warning is not None
        self._report(step, values if logged else {})

    def accumulate(self, step: int) -> Tensor:
        """Forward and backward over this rank's share. Every rank.

        Returns:
            (3,) float32, sums over ranks: mean loss per token, marks (see `StepPlace`), numbers of `Words`.
        """
        train, strategy = self.config.train, self.strategy
        # dropout, if the model has any: a function of the step and the rank, so a checkpoint need not hold its state
        torch.manual_seed(stable_seed("step", train.seed, step, strategy.rank))
        start, stop = share(train.global_batch_size, strategy.rank, strategy.world_size)
        batch = self._read(step, start, stop)
        steps = self.micro_steps
        total = torch.zeros((), device=strategy.device)
        pieces = micro_batches(batch, steps=steps, micro_batch_size=train.micro_batch_size, device=strategy.device)
        for index, piece in enumerate(pieces):
            with strategy.micro_step(self.model, last=index == steps - 1):
                with strategy.autocast():
                    logits = self.model(input_ids=piece.input_ids, use_cache=False).logits
                loss = summed_loss(logits, piece.labels) / self.tokens_per_step
                if self.data_fault is not None:
                    loss = loss * math.nan  # a step that no rank applies
                strategy.backward(self.model, loss)
            total += loss.detach()
        asked, faulty = self.stop.number is not None, self.data_fault is not None
        words = Words(stops=asked, faults=faulty, saves=strategy.is_main and self.saver.overdue())
        numbers = (float(self.place(step).mark), words.number(strategy.world_size))
        sums = torch.stack([total, *(total.new_full((), number) for number in numbers)])
        return strategy.sum_step(sums, self.parameters)

    def _read(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of a step. Several ranks: stand-ins if that fails, and all learn of it later.

        This rank cannot leave alone: the others would wait for it in the next collective. With updates inside the
        backward pass it must, for those apply whatever comes.

        Raises:
            UnreadableDataError: They cannot be read, and this rank is alone.
        """
        try:
            if self.data_fault is None:
                return self.corpus.train.sequences(step, start, stop)
        except Exception as error:
            if self.strategy.world_size == 1 or self.per_layer is not None:
                self.half_done = None  # nothing has begun
                raise UnreadableDataError(f"the data of step {step + 1} cannot be read: {one_line(error)}") from error
            self.data_fault = error
        blank = torch.zeros((stop - start, self.config.data.seq_len), dtype=torch.int64)
        return Batch(blank, blank)

    def _take_back(self, step: int) -> None:
        """Ends the run at the end of the step before, from which on nothing was applied on any rank. Every rank."""
        self.pending = None
        self.done, self.tokens = step, self.tokens - (self.done - step) * self.tokens_per_step
        mine = None if self.data_fault is None else one_line(self.data_fault)
        reasons = enumerate(self.strategy.gather_objects(mine))
        who = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None)
        raise UnreadableDataError(f"the data of step {step + 1} cannot be read: {who}") from self.data_fault

    @contextmanager
    def _changing(self, what: str | None) -> Iterator[None]:
        """What is left of `half_done` after an error says that the state is of no whole step."""
        self.half_done = what
        yield
        self.half_done = None

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of a step."""
        train = self.config.train
        return micro_steps(train.global_batch_size, self.strategy.world_size, train.micro_batch_size)

    def update(self) -> Tensor:
        """Applies the step's gradients, unless the backward pass has; returns their global norm. Every rank."""
        if self.per_layer is not None:
            self.optimizer.step()  # finds nothing left to do; learning-rate schedules insist on it
            return self.strategy.sum(self.per_layer.take_squares()).sqrt()
        max_norm = self.config.optim.clip_norm
        return self.strategy.update(self.model, self.optimizer, self.parameters, max_norm=max_norm)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch that are predicted (packed sequences have no gaps)."""
        return self.config.train.global_batch_size * self.config.data.seq_len

    def merge(self, step: int) -> dict[str, float]:
        """Merges after a merge step; returns the merge's metrics. Every rank."""
        assert self.merges is not None
        counter = self._wire_counter("wire/merge")
        with ExitStack() as stack:
            stack.enter_context(self._changing("a merge"))
            if counter is not None:
                stack.enter_context(counter)
            report = self.merges.finish(step)
        assert report is not None
        self.progress.line(merge_line(report))
        self.diagnosis.take_merge(report)
        means = {f"merge/{key}": value for key, value in report.means().items()}
        return (
            means
            | {"merge/seconds": report.seconds}
            | self._wire_values("wire/merge", counter, earlier=report.sketch_bytes)
        )

    def evaluate(self, step: int) -> float:
        """Held-out loss in nats after `step` optimizer steps. Every rank."""
        train = self.config.train
        self.settle()
        with self.rates.paused():
            held_out = self.corpus.eval
            loss = evaluate(self.model, held_out, strategy=self.strategy, micro_batch_size=train.micro_batch_size)
        self.writer.log(step, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
        tokens = counted_tokens(held_out.labels)
        self.progress.line(f"eval at step {step}: loss {loss:.4f}, perplexity {perplexity(loss):.3f} ({tokens} tokens)")
        return loss

    def _report(self, step: int, values: dict[str, float]) -> None:
        done = step + 1
        rate = self.rates.tokens_per_second
        self.progress.update(done, loss=values.get("train/loss"), tokens_per_second=rate)
        if not values:
            return
        values["train/perplexity"] = perplexity(values["train/loss"])
        values |= {
            "train/skipped_steps": self.health.skipped,
            "perf/tokens_per_second": rate,
            "perf/step_seconds": self.rates.seconds_per_step,
            **memory_metrics(self.strategy.device),
        }
        self.writer.log(done, values)

    def _wire_counter(self, name: str) -> WireCounter | None:
        """Counts the bytes of the first merge and of the first step without one, if asked to."""
        if self.config.train.wire_counter != "once" or name in self.counted:
            return None
        self.counted.add(name)
        return WireCounter(self.strategy.world_size)

    def _wire_values(self, name: str, counter: WireCounter | None, *, earlier: int = 0) -> dict[str, float]:
        """Bytes that were counted, and reduced `earlier`, outside the counter."""
        if counter is None:
            return {}
        sent = counter.sent_bytes() + earlier * (self.strategy.world_size - 1) // self.strategy.world_size
        return {f"{name}_payload_bytes": counter.payload_bytes() + earlier, f"{name}_sent_bytes": sent}
