"""The merge: every rank takes part, one layer at a time, low-rank tensors on the wire.

On a merge step u the trainer calls `prepare(u)` before the forward pass and `finish(u)` after the optimizer step.

    collect    probes gather each layer's weight gradient, sketched (F x l) or dense, in the backward passes, from which
               it is summed into its owner's copy; layers are dealt out over the ranks
    factorise  the owners find their P, at the same time, still inside the last backward pass (`subspace`)

and in `finish`, layer by layer,

    broadcast  P, packed as the layer will hold it, to all ranks that store the model once
    merge      each of them folds, re-quantizes and compensates its own rows of W (functional.compensation);
               nobody ever holds a whole W
    hand on    what was found, where there are several copies of the model (HSDP): each merges other layers (`turns`)
    transport  the optimizer's moments of B into the new basis

`B` is exchanged only where its rows do not coincide with the rank's rows of W (a row group cut by uneven shards):
then it is all-gathered, which is still low-rank. In a layer's first merge, which P of zeros tells (or, after a start
that has made up for quantization, that there was no update before), W is read once more from its source, so that the
first quantization's error is compensated too instead of being lost.

A layer whose gradient is zero on all ranks (an expert that got no token, a dropped layer, an unused head) keeps its P,
B, W_q and moments as they are until the next merge. If it has no P yet, it gets a random one, or it would not learn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.defaults import plain_defaults
from loqt_scale.layers import check_kinds, copies, loqt_layers
from loqt_scale.merge.attached import found_or_given
from loqt_scale.merge.beginning import FirstBases, make_up
from loqt_scale.merge.begun import BegunMerge
from loqt_scale.merge.factor_updates import RoundingWatch, check_optimizers
from loqt_scale.merge.initial_checks import agreed_source, check_first_weights
from loqt_scale.merge.model_merge import ModelMerge
from loqt_scale.merge.order import Passes, StepOrder, StepWatch
from loqt_scale.merge.placed import InitialWeights
from loqt_scale.merge.report import MERGE_DIAGNOSTICS, MergeReport, StartReport, warn
from loqt_scale.merge.schedule import MergeSchedule
from loqt_scale.merge.settings import STATE_VERSION, check_config, check_settings, settings_of
from loqt_scale.strategies import Editing


class MergeCoordinator:
    """Runs the merges of a model's LoQT layers.

    Args:
        model: The converted model, its parameters allocated; or what wraps it: a DistributedDataParallel, a DeepSpeed
            engine, what `fully_shard` or torch.compile made of it.
        optimizer: Its optimizer (or several, in a list); its states of the factors follow
            `config.merge.optimizer_state`.
        config: The method's settings, by which the model was converted.
        total_steps: Steps of the run; no merge falls after `last_step_fraction` of it. None: it has no known end.
        editing: How the model is spread over ranks (a strategy's `editing`). Default: found (`strategies.adopt`).
        seed: Seed of the sketches.
        initial_weights: The weights before quantization, under the names of the unconverted model: a state dict, a
            model, or anything with `rows(name, start, stop)`.

    Raises:
        UserError: Ranks of which nothing sums the gradients, factors that nobody trains, or settings that are not the
            model's; with the line to write.

    Attributes:
        description: How the model is spread over ranks, in a few words.
        on_merge: Functions that `finish` calls with the report after each merge; every rank's own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: LoQTConfig,
        *,
        total_steps: int | None = None,
        editing: Editing | None = None,
        seed: int = 0,
        initial_weights: InitialWeights | nn.Module | Mapping[str, Tensor] | None = None,
    ) -> None:
        check_kinds(model, config)
        found = found_or_given(model, optimizer, editing)
        self.description, self._editing, optimizers = found.description, found.editing, found.optimizers
        self._layers, self._check_ranks = dict(loqt_layers(found.model)), found.check
        factors = {name: layer.factor for name, layer in self._layers.items()}
        self._editing.check_held(optimizers, factors)
        check_optimizers(self._layers, optimizers)
        check_config(self._layers, config)
        prefix = getattr(found.model, "base_model_prefix", "")
        self._settings = settings_of(self._layers, config, seed=seed, total_steps=total_steps)
        source = agreed_source(initial_weights, self._layers, prefix, self._editing.comm, self._settings)
        self._init = config.init
        self._schedule = MergeSchedule(config.merge, total_steps)
        self._bases = FirstBases(self._layers, self._editing)
        self._rounding = RoundingWatch(self._layers, self._editing, optimizers)
        self._order = StepOrder(StepWatch(optimizers), Passes(optimizer, found.engine))
        self._merging = ModelMerge(self._layers, optimizers, config, self._editing, seed=seed, initial_weights=source)
        self.on_merge: list[Callable[[MergeReport], None]] = []
        copies.release(self._layers.values())

    @property
    def steps(self) -> list[int]:
        """All merge steps of the run, ascending; of a run without a known end those up to the next."""
        return self._schedule.steps

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self._editing.comm.is_main

    @property
    def position(self) -> int:
        """The next step."""
        return self._order.position

    def begin(self) -> StartReport | None:
        """Before the first step of a run: the start that `loqt.init` asks for; nothing if that is zero. Every rank.

        Raises:
            ValueError: The weights before quantization are needed and were not given.
        """
        return None if self._init == "zero" else self._merging.start()

    def check_first_weights(self) -> None:
        """Before the first merge: refuses `initial_weights` that are not those of this model. Every rank.

        Raises:
            UserError: The layer in which they differ most.
        """
        if self._merging.initial_weights is not None:
            check_first_weights(self._layers, self._merging.initial_weights, self._editing)

    def go_on(self, step: int) -> None:
        """Says that a run goes on at a step, with the merges before it made or named by `require`. Local."""
        self._order.position, self._order.known = step, True
        self._bases.trust()

    def expect_state(self, *, merged: bool) -> None:
        """Has the first `prepare` look whether the states of a run that goes on were all loaded. Local.

        Args:
            merged: Whether the model had merged when these merges were attached to it.
        """
        self._bases.expect_state(merged=merged, compensated=bool(self._merging.first_due))

    def expect_first_merge(self) -> None:
        """Says that no merge has been made yet (on a resume; P of zeros says so by itself). Local."""
        self._merging.expect_first()

    def has_merged(self) -> bool:
        """Whether P has values: after the first merge, or a start that makes up for quantization. Every rank."""
        return self._bases.has_basis(next(iter(self._layers)))

    def is_merge_step(self, step: int) -> bool:
        """Whether a merge follows the optimizer step `step`."""
        return step in self._schedule

    def require(self, step: int) -> None:
        """Makes a step a merge step, if it is none (a merge was postponed to it before a resume). Local."""
        self._schedule.require(step)

    def postpone(self, step: int) -> None:
        """Moves the merge of a step that was skipped to the next step, and drops what was collected. Every rank.

        If the next step ends in a merge anyway, the two are one. Layers that were merged before `finish` raised an
        error are merged again.
        """
        if self.is_merge_step(step):
            self._schedule.postpone(step)
        self._merging.drop()
        self._order.leave(step)

    @plain_defaults()
    def prepare(self, step: int | None = None, *, backward_passes: int | None = None) -> None:
        """Before the forward passes of a step: attaches probes if the step ends in a merge. Every rank.

        Again for the same step it does nothing. A merge step that was left out, or the first one if a run counts from
        1, say, is made up for: its merge follows this step.

        Args:
            step: The step, from 0 over the whole run; default: the steps are counted here.
            backward_passes: How many will follow. If given, each sends what it has collected to the layers' owners,
                which factorise it in the last one: every rank, and all must agree that this is a merge step. If not,
                this is done in `finish`, and until then every rank holds what all layers have collected.

        Raises:
            RuntimeError: The merge of an earlier step was never finished, or steps go back.
        """
        before, known = self._order.position, self._order.known
        told = self._bases.check_beginning(self.progress(), known=known or bool(step))
        step = self._order.prepare(step)
        told += make_up(self._schedule, self._bases, step, before if known else None)
        told += self._schedule.words_at_end(step)
        if self._merges_after(step) and self._order.open != step:
            self._check_ranks()
            told += self._rounding.words()
            self._merging.collect(step, backward_passes)
            self._order.open = step
        for text in told:
            warn(self._editing.comm, text)

    @torch.no_grad()
    @plain_defaults()
    def finish(self, step: int | None = None) -> MergeReport | None:
        """After the optimizer step: merges all layers if the step is a merge step, else does nothing. Every rank.

        A merge whose gradients are not finite, or zero in all layers, or whose update the optimizer has skipped, is
        postponed to the next step, with a warning. Layers whose B is frozen (`requires_grad` False) stay as they are.

        If it raises, the model still is one that can be trained. Where what was collected is of no use (the first two
        errors below), the merge is due at the next step. After any other error `finish` may be called again, and merges
        the layers that are not merged yet, or `postpone`.

        Args:
            step: The step; default: the one that was prepared.

        Raises:
            RuntimeError: The step was not prepared, no layer was in a backward pass, or there were more than was said.
            UserError: The optimizer keeps something of the factors that cannot be carried over.
        """
        step = self._order.finish(step)
        if step is None:  # Accelerate or an engine accumulates
            return None
        if words := self._order.words_when_idle():
            warn(self._editing.comm, words)
        if not self._merges_after(step):
            self._merging.drop()
            self._order.leave(step)
            return None
        if not torch.is_autocast_enabled(self._editing.device.type):
            return self._merge(step)
        with torch.autocast(self._editing.device.type, enabled=False):  # a merge is in float32, wherever it is called
            return self._merge(step)

    def _merges_after(self, step: int) -> bool:
        return self.is_merge_step(step) and any(layer.factor.requires_grad for layer in self._layers.values())

    def _merge(self, step: int) -> MergeReport | None:
        started = time.perf_counter()
        self._editing.settle()
        if not self._merging.is_under_way:
            self._merging.check_states()
            if reason := self._find(step):
                warn(self._editing.comm, f"the merge of step {step} is postponed to step {step + 1}: {reason}")
                self.postpone(step)
                return None
        done = self._merging.run()
        self._bases.have_merged(self._merging.search.live.keys())
        self._order.leave(step)
        report = self._report(step, done, started)
        for told in self.on_merge:
            told(report)
        return report

    def _find(self, step: int) -> str:
        """`ModelMerge.find`; if what was collected is of no use, the merge is due at the next step. Every rank."""
        try:
            return self._merging.find(was_skipped=self._order.was_skipped)
        except RuntimeError:
            if self._order.open == step:
                self.postpone(step)
            raise

    def _report(self, step: int, done: BegunMerge, started: float) -> MergeReport:
        values = done.read(self._editing)
        return MergeReport(
            step=step,
            index=self._schedule.index(step),
            seconds=time.perf_counter() - started,
            sketch_bytes=done.sketch_bytes,
            layers={name: dict(zip(MERGE_DIAGNOSTICS, values[name], strict=True)) for name in self._layers},
            kept=tuple(done.kept),
        )

    # ---- a run that goes on ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """`progress` and the settings: plain data, the same on all ranks. Local.

        Raises:
            RuntimeError: Between the update of a merge step and its merge, or if it is not known whether it was made.
        """
        if self._order.is_half_done:
            raise RuntimeError(f"step {self._order.open} ends in a merge; call finish before state_dict")
        return {"version": STATE_VERSION, **self.progress(), "settings": copy.deepcopy(self._settings)}

    def progress(self) -> dict[str, Any]:
        """What of the state changes from step to step: the next step, merges that were moved. Local.

        Before a step's update it is that of the step's beginning, also between `prepare` and `finish`.
        """
        return {
            "position": self.position,
            "moved": self._schedule.moved,
            "first_due": sorted(self._merging.first_due),
            "watched": self._order.watch.works,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Goes on where a state was saved; the model's and the optimizer's own states are loaded beside it. Local.

        Args:
            state: What `state_dict` returned. A step that has begun is given up, with what it has collected.
            strict: Whether all settings must be as they were. If not, a warning says what differs; what the layers'
                stored tensors mean (rank, scale, side, quantization) must be the same all the same.

        Raises:
            UserError: Settings differ; each with both values. Nothing has been changed.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"this is no state of a MergeCoordinator of version {STATE_VERSION}: {sorted(state)}")
        for text in check_settings(state["settings"], self._settings, strict=strict):
            warn(self._editing.comm, text)
        self._merging.drop()
        self._order.abandon()
        self._schedule.restart(step for step in state["moved"] if step >= state["position"])
        self._merging.first_due = set(state["first_due"])
        self._order.watch.works = state["watched"]
        self.go_on(state["position"])
        self._bases.doubt()
