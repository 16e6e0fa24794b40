"""The training loop. One step, on every rank:

    read       this rank's share of the global batch
    passes     forward and backward, one micro-batch at a time; the last one sums the gradients over ranks
    sum        one all-reduce: the loss, and whether all ranks are at this step and well
    update     clip, then the optimizer; nothing is applied if the gradient's norm is not finite
    pending    loss and norm start on their way to the host, which does not wait for them
    finish     of the step before, whose numbers have arrived by now: skipped or counted, merged if it is a merge step,
               logged

So the host always runs a step ahead of what it knows. Before a merge, an evaluation or a checkpoint it waits.

Not here: `reading` (text that cannot be read), `agreement` (ranks at different steps), `health` (numbers that are not
finite), `stopping` (signals), `rescue` (an error ends the run only when it is saved), `restart` (checkpoints). Whatever
talks to other ranks goes through the strategy; whatever knows about subspaces, through the MergeCoordinator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from loqt_scale.checkpoint import CHECKPOINTS, CheckpointError, CheckpointSaver
from loqt_scale.config import RunConfig
from loqt_scale.data import Batch, Corpus
from loqt_scale.data.batching import counted_tokens, micro_batches
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.functional.shares import micro_steps, share
from loqt_scale.metrics import MetricsWriter, Progress, RateMeter, memory_metrics, perplexity
from loqt_scale.metrics.wire_counter import FirstCounted
from loqt_scale.model.build import ModelDesign, build_model
from loqt_scale.model.documents import attend
from loqt_scale.optim import LearningRates, StreamedAdamW, UpdateInBackward
from loqt_scale.process.environment import node_size
from loqt_scale.process.notice import launchers_notice
from loqt_scale.process.streams import warn
from loqt_scale.strategies import Strategy
from loqt_scale.training.agreement import Flags, StepTag
from loqt_scale.training.assembly import make_merges, make_optimizer, make_throughput
from loqt_scale.training.diagnosis import Diagnosis, chance_overlaps
from loqt_scale.training.evaluation import evaluate_corpus
from loqt_scale.training.health import Health, spoil_gradient
from loqt_scale.training.messages import eval_line, merge_line, start_line
from loqt_scale.training.pending import HostCopy, PendingStep
from loqt_scale.training.profiling import StepProfile
from loqt_scale.training.reading import ShareReader, WaitWatch
from loqt_scale.training.rescue import saved_first
from loqt_scale.training.restart import manifest_of, side_files_of
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
        self.config, self.corpus, self.strategy = config, corpus, strategy
        self.progress, self.writer, self.stop = progress, writer, stop or StopRequest()

        # what trains, and by what
        self.throughput = make_throughput(design.model, config, strategy)  # before it is sharded
        self.built = build_model(design, config.model, strategy)
        attend(self.built.model, config.data, separator=corpus.tokenizer.eos_token_id, warns=strategy.comm.is_main)
        self.parameters = [p for p in self.built.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.built, config, strategy.placement)
        self.model = strategy.step.wrap(self.built.model, self.optimizer)
        if config.model.trained_dtype == "bfloat16" and self.micro_steps > 1:
            strategy.step.sum_in_float32(self.parameters)
        self.per_layer: UpdateInBackward | None = None
        if config.optim.per_layer:
            assert isinstance(self.optimizer, StreamedAdamW)
            self.per_layer = UpdateInBackward(self.parameters, self.optimizer, strategy.placement.local)
        self.learning_rates = LearningRates.of_run(config.optim, config.train.steps)
        self.scheduler = LambdaLR(self.optimizer, lambda step: self.learning_rates.factor(step))
        self.merges = make_merges(self.built, self.optimizer, config, strategy.editing)

        # where the run stands
        self.done = 0  # steps
        self.updates = 0  # steps that were not skipped
        self.tokens = 0
        self.eval_before: float | None = None
        self.pending: PendingStep | None = None
        self.half_done: str | None = None  # what is changing the state, or was interrupted in it

        # what may skip a step, end the run or save it
        self.reader = ShareReader(
            corpus.train, config.data.seq_len, alone=strategy.comm.world_size == 1 or self.per_layer is not None
        )
        # With per-layer updates a bad gradient is applied before the norm is known. It cannot be skipped, so the first
        # bad step ends the run.
        self.health = Health(1 if config.optim.per_layer else config.optim.max_skipped_steps)
        self.saver = CheckpointSaver(
            Path(config.train.run_dir) / CHECKPOINTS,
            config.checkpoint,
            strategy.editing,
            tell=progress.line,
        )
        self.stopping, self.save_again = False, False  # agreed by all ranks: end here; save, the last save has failed

        # what is told of it
        self.rates = RateMeter()
        self.waits = WaitWatch(strategy.comm.rank, progress.line if strategy.comm.is_main else warn)
        self.notice = launchers_notice()
        self.merge_seconds = 0.0  # of this process
        rank, device = strategy.comm.rank, strategy.comm.device
        self.profile = StepProfile(
            config.train.profile, config.train.run_dir, rank=rank, device=device, tell=progress.line
        )
        self.diagnosis = Diagnosis(config.loqt, config.optim, chance_overlaps(self.built.model), progress.line)
        self.wire = FirstCounted(
            strategy.comm.world_size, node_size=node_size(), on=config.train.wire_counter == "once"
        )

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[float, float]:
        """Trains to the end, from where it stands; returns held-out loss before and after, in nats. Every rank.

        Raises:
            Stopped: A signal asked for it; the run has been saved.
            CheckpointError: The trained model could not be saved, at the end either.
        """
        if self.eval_before is None:
            self.begin()
            self.eval_before = self.evaluate(0)
        with closing(self.profile), self.stop.patience(), self.saver, saved_first(self):
            while self.done < self.config.train.steps:
                self._profiled_step(self.done)
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
            numbers = self.strategy.comm.gather_objects(self.stop.number)
            signals = filter(None, numbers)  # perhaps one rank alone was told
            raise Stopped(next(signals), together=True)

    def _profiled_step(self, step: int) -> None:
        self.profile.begin(step)
        self.step(step)
        if self.profile.ends_with(step):
            with self.rates.paused():
                self.profile.close()

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """Takes one optimizer step and finishes the one before; of a merge step itself, too. Every rank."""
        tag = self.tag(step)
        if tag.merges:
            self.finish_pending()  # the step before announced this merge, whose collectives begin in the backward pass
        with self.wire.first("wire/step", skip=tag.merges) as sent:
            if self.merges is not None:
                self.merges.prepare(step, backward_passes=self.micro_steps)
            sums = self.accumulate(step)
            metrics = {f"train/lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
            with self._changing("an update"), self.profile.region("optimizer"):
                norm = self.update()
        numbers = HostCopy(torch.cat([sums, norm.reshape(1).to(sums)]))
        self.done, self.tokens = step + 1, self.tokens + self.tokens_per_step
        metrics |= {"train/tokens": self.tokens, **sent}
        before, self.pending = self.pending, PendingStep(tag, numbers, metrics)
        self._finish(before)  # its numbers are there by now
        if tag.merges:  # it must be known whether there is something to merge
            self.finish_pending()
        self.scheduler.step()
        self.rates.tick(self.tokens_per_step, self.reader.waited)
        self.waits.take(self.rates)

    def tag(self, step: int) -> StepTag:
        """What this rank believes a step to be."""
        here, following = (self.merges is not None and self.merges.is_merge_step(s) for s in (step, step + 1))
        return StepTag(step, merges=here, merges_next=following)

    def accumulate(self, step: int) -> Tensor:
        """Reads this rank's share and takes its passes; gradients are then those of the whole batch. Every rank.

        Returns:
            (3,) float32, sums over ranks: mean loss per token, checksums (see `StepTag`), numbers of `Flags`.
        """
        train, spread = self.config.train, self.strategy.step
        # dropout, if the model has any: a function of the step and the rank, so a checkpoint need not hold its state
        torch.manual_seed(stable_seed("step", train.seed, step, spread.data_rank))
        with self.profile.region("data"):
            batch = self.reader.read(step, *share(train.global_batch_size, spread.data_rank, spread.data_size))
        with self._changing("an update" if self.per_layer is not None else None):
            loss = self._passes(batch)
            numbers = (float(self.tag(step).checksum), self._flags().number(spread.data_size))
            sums = torch.stack([loss, *(loss.new_full((), number) for number in numbers)])
            return spread.sum_step(sums, self.parameters)

    def _passes(self, batch: Batch) -> Tensor:
        """Forward and backward over this rank's share; returns its part of the mean loss, () float32. Every rank."""
        spread, device, steps = self.strategy.step, self.strategy.comm.device, self.micro_steps
        total = torch.zeros((), device=device)
        pieces = micro_batches(batch, steps=steps, micro_batch_size=self.config.train.micro_batch_size, device=device)
        for index, piece in enumerate(pieces):
            with spread.micro_step(self.model, last=index == steps - 1):
                with self.profile.region("forward"), spread.autocast():
                    loss = self.model(input_ids=piece.input_ids, targets=piece.labels) / self.tokens_per_step
                if self.reader.fault is not None:
                    loss = loss * math.nan  # a step that no rank applies
                with self.profile.region("backward"):
                    spread.backward(self.model, spoil_gradient(loss))
            total += loss.detach()
        return total

    def _flags(self) -> Flags:
        overdue = self.strategy.comm.is_main and self.saver.overdue()
        return Flags(stops=self.stop.number is not None, faults=self.reader.fault is not None, saves=overdue)

    def update(self) -> Tensor:
        """Applies the step's gradients, unless the backward pass has; returns their global norm. Every rank."""
        if self.per_layer is not None:
            self.optimizer.step()  # finds nothing left to do; learning-rate schedules insist on it
            return self.strategy.placement.row_shards.sum(self.per_layer.take_squares()).sqrt()
        max_norm = self.config.optim.clip_norm
        return self.strategy.step.update(self.model, self.optimizer, self.parameters, max_norm=max_norm)

    # ---- its numbers, a step later ----------------------------------------------------------------------------------

    def finish_pending(self) -> None:
        """Waits for the last step's numbers, if it is not finished yet: judges, merges, logs. Every rank.

        Raises:
            OutOfStepError: Another rank was at another step, or disagrees on whether it ends in a merge.
            UnreadableDataError: A rank could not read its share of the step, which nobody has applied.
            NonFiniteLossError: The step was one too many in a row that could not be applied.
        """
        pending, self.pending = self.pending, None
        self._finish(pending)

    def _finish(self, pending: PendingStep | None) -> None:
        if pending is None:
            return
        loss, checksums, told, norm = pending.numbers.values()
        tag, ranks = pending.tag, self.strategy.step.data_size
        tag.check(checksums, ranks)
        self._obey(Flags.of_sum(told, ranks), tag.step)
        values = {"train/loss": loss, "train/grad_norm": norm} | pending.metrics
        warning = self.health.judge(tag.step + 1, loss, norm)
        if warning is None:
            self.updates += 1
            self.diagnosis.take_loss(loss)
            values |= self.merge(tag.step) if tag.merges else {}
        else:
            self.progress.line(f"WARNING: {warning}")
            if tag.merges and self.merges is not None:
                self.merges.postpone(tag.step)
        logged = (tag.step + 1) % self.config.train.log_every == 0 or tag.merges or warning is not None
        self._log(tag.step + 1, values if logged else {})

    def _obey(self, flags: Flags, step: int) -> None:
        """Does what ranks asked for in a step. If one could not read it, the run ends at the step before."""
        if flags.faults:
            self.pending = None
            self.done, self.tokens = step, self.tokens - (self.done - step) * self.tokens_per_step
            self.reader.fail(step, self.strategy.comm)
        self.stopping, self.save_again = self.stopping or flags.stops > 0, self.save_again or flags.saves > 0

    def merge(self, step: int) -> dict[str, float]:
        """Merges after a merge step; returns the merge's metrics. Every rank."""
        assert self.merges is not None
        with self._changing("a merge"), self.profile.region("merge"), self.wire.first("wire/merge") as sent:
            report = self.merges.finish(step)
        if report is None:  # postponed, as it has warned
            return {}
        self.wire.add_reduced(sent, "wire/merge", report.sketch_bytes)
        self.progress.line(merge_line(report))
        self.merge_seconds += report.seconds
        self.diagnosis.take_merge(report)
        means = {f"merge/{key}": value for key, value in report.means().items()}
        return means | {"merge/seconds": report.seconds} | sent

    def _log(self, done: int, values: dict[str, float]) -> None:
        rate = self.rates.tokens_per_second
        self.progress.update(done, loss=values.get("train/loss"), tokens_per_second=rate)
        if not values:
            return
        self.notice.compare(self.rates.seconds_per_step, self.saver.seconds, self.progress.line)
        values["train/perplexity"] = perplexity(values["train/loss"])
        values |= {
            "train/skipped_steps": self.health.skipped,
            "perf/tokens_per_second": rate,
            "perf/step_seconds": self.rates.seconds_per_step,
            "perf/data_wait_seconds": self.rates.waited_per_step,
            "perf/merge_seconds": self.merge_seconds,
            **self.throughput.metrics(rate),
            **memory_metrics(self.strategy.comm.device),
        }
        if self.corpus.mixed is not None:
            values |= self.corpus.mixed.numbers(done)
            self.diagnosis.take_epochs({name: values[f"data/{name}/epochs"] for name in self.corpus.mixed.streamed})
        self.writer.log(done, values)

    # ---- evaluations and checkpoints --------------------------------------------------------------------------------

    def evaluate(self, step: int) -> float:
        """Held-out loss in nats after `step` optimizer steps. Every rank."""
        self.finish_pending()
        with self.rates.paused():
            spread, size = self.strategy.step, self.config.train.micro_batch_size
            loss, losses = evaluate_corpus(self.model, self.corpus, step=spread, micro_batch_size=size)
        bits, each = self.corpus.bits_per_byte(loss), {f"eval/{name}/loss": value for name, value in losses.items()}
        total = {"eval/loss": loss, "eval/perplexity": perplexity(loss), "eval/bits_per_byte": bits}
        self.writer.log(step, total | each)
        self.progress.line(eval_line(step, loss, losses, counted_tokens(self.corpus.eval.labels), bits))
        return loss

    def save(self, *, keep_all: bool = False) -> None:
        """Saves a checkpoint, or begins to; `keep_all` removes no older one for it. Every rank."""
        self.finish_pending()
        self.save_again = False
        with self.rates.paused():
            self.saver.save(manifest_of(self), side_files_of(self), self.built.model, self.optimizer, keep_all=keep_all)

    def save_if_unsaved(self) -> None:
        """Waits for the last save, and makes one more try if it has failed. Every rank."""
        self.saver.wait()
        if self.saver.saved != self.done:
            self.save()
            self.saver.wait()

    # ---- what a step is made of -------------------------------------------------------------------------------------

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of a step."""
        train = self.config.train
        return micro_steps(train.global_batch_size, self.strategy.step.data_size, train.micro_batch_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch that are predicted (packed sequences have no gaps)."""
        return self.config.train.global_batch_size * self.config.data.seq_len

    @contextmanager
    def _changing(self, what: str | None) -> Iterator[None]:
        """What is left of `half_done` after an error says that the state is of no whole step."""
        self.half_done = what
        yield
        self.half_done = None
