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
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.defaults import plain_defaults
from loqt_scale.layers import LoQTLayer, check_kinds, copies, loqt_layers
from loqt_scale.merge.beginning import FirstBases, make_up
from loqt_scale.merge.begun import BegunMerge
from loqt_scale.merge.first_weights import agreed_source, check_first_weights, still_due
from loqt_scale.merge.one_layer import LayerMerge, own_names
from loqt_scale.merge.order import NOTHING_SEEN, OUTLIVED, Passes, StepOrder, StepWatch, reason_to_wait
from loqt_scale.merge.placed import InitialWeights
from loqt_scale.merge.report import MERGE_DIAGNOSTICS, MergeReport, StartReport
from loqt_scale.merge.schedule import MergeSchedule
from loqt_scale.merge.settings import STATE_VERSION, check_config, check_settings, settings_of
from loqt_scale.merge.spread import RoundingWatch, check_optimizers, found_or_given
from loqt_scale.merge.start import start_compensated
from loqt_scale.merge.subspace import SubspaceSearch
from loqt_scale.optim import parameters_of
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
        self.description, self._editing, self._optimizers = found.description, found.editing, found.optimizers
        self._layers, self._check_ranks = dict(loqt_layers(found.model)), found.check
        factors = {name: layer.factor for name, layer in self._layers.items()}
        self._editing.check_held(self._optimizers, factors)
        check_optimizers(self._layers, self._optimizers)
        check_config(self._layers, config)
        self._config, self._seed = config, seed
        prefix = getattr(found.model, "base_model_prefix", "")
        self._settings = settings_of(self._layers, config, seed=seed, total_steps=total_steps)
        comm = self._editing.comm
        self._initial_weights = agreed_source(initial_weights, self._layers, prefix, comm, self._settings)
        self._schedule = MergeSchedule(config.merge, total_steps)
        self._bases = FirstBases(self._layers, self._editing)
        self._rounding = RoundingWatch(self._layers, self._editing, self._optimizers)
        self._order = StepOrder(StepWatch(self._optimizers), Passes(optimizer, found.engine))
        self._search = SubspaceSearch(self._layers, config.subspace, self._editing.comm, seed)
        self._sent_before = 0  # bytes, by the search, before this merge step
        self._begun: BegunMerge | None = None  # a merge, some layers of which are not merged yet
        self._first_due: set[str] = set()  # layers; of others P of zeros tells it
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
        if self._config.init == "zero":
            return None
        if self._initial_weights is None:
            raise ValueError("loqt.init is 'loftq', which needs the weights before quantization; give initial_weights")
        self.expect_first_merge()
        owners, source = self._search.owners, self._initial_weights
        return start_compensated(self._layers, owners, source, self._config, self._editing, seed=self._seed)

    def check_first_weights(self) -> None:
        """Before the first merge: refuses `initial_weights` that are not those of this model. Every rank.

        Raises:
            UserError: The layer in which they differ most.
        """
        if self._initial_weights is not None:
            check_first_weights(self._layers, self._initial_weights, self._editing)

    def go_on(self, step: int) -> None:
        """Says that a run goes on at a step, with the merges before it made or named by `require`. Local."""
        self._order.position, self._order.known = step, True
        self._bases.trust()

    def expect_state(self, *, merged: bool) -> None:
        """Has the first `prepare` look whether the states of a run that goes on were all loaded. Local.

        Args:
            merged: Whether the model had merged when these merges were attached to it.
        """
        self._bases.expect_state(merged=merged, compensated=bool(self._first_due))

    def expect_first_merge(self) -> None:
        """Says that no merge has been made yet (on a resume; P of zeros says so by itself). Local."""
        self._first_due = {own for name, layer in self._layers.items() for own in own_names(name, layer)}

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
        self._drop()
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
            self._editing.settle()
            told += self._rounding.words()
            self._sent_before = self._search.sent_bytes
            self._search.attach(step, backward_passes)
            self._order.open = step
        for text in told:
            self._warn(text)

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
            self._warn(words)
        if not self._merges_after(step):
            self._drop()
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
        if self._begun is None:
            self._check_states()
            if self._editing.keeps_gradients and self._search.outlives:
                self._warn(OUTLIVED)
            sketch_bytes = self._search.sent_bytes - self._sent_before
            if reason := self._collected(step):
                self._warn(f"the merge of step {step} is postponed to step {step + 1}: {reason}")
                self.postpone(step)
                return None
            self._begun = BegunMerge(sketch_bytes)
            if any([copies.have_changed(layer) for layer in self._layers.values()]):
                self._warn(copies.AVERAGED)
        begun, kept = self._begun, self._begun.kept
        begun.merge_rest(self._layers, self._search, self._merging(), self._editing)
        self._begun = None
        self._bases.have_merged(self._search.live.keys())
        self._first_due &= set(kept)
        self._initial_weights = still_due(self._initial_weights, self._layers, set(kept))
        self._order.leave(step)
        values = begun.read(self._editing)
        layers = {name: dict(zip(MERGE_DIAGNOSTICS, values[name], strict=True)) for name in self._layers}
        report = MergeReport(
            step=step,
            index=self._schedule.index(step),
            seconds=time.perf_counter() - started,
            sketch_bytes=begun.sketch_bytes,
            layers=layers,
            kept=tuple(kept),
        )
        for told in self.on_merge:
            told(report)
        return report

    def _collected(self, step: int) -> str:
        """Afterwards every owner has found its P; why the merge must wait, if so. Every rank.

        Raises:
            RuntimeError: What was collected is of no use; the merge is due at the next step.
        """
        try:
            return self._reason_to_wait(self._search.finish())
        except RuntimeError:
            if self._order.open == step:
                self.postpone(step)
            raise

    def _drop(self) -> None:
        """Forgets what this step has collected, and what it has not merged yet. Every rank."""
        self._search.drop()
        self._begun = None

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
            "first_due": sorted(self._first_due),
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
            self._warn(text)
        self._drop()
        self._order.abandon()
        self._schedule.restart(step for step in state["moved"] if step >= state["position"])
        self._first_due = set(state["first_due"])
        self._order.watch.works = state["watched"]
        self.go_on(state["position"])
        self._bases.doubt()

    # ---- what could go wrong in silence ------------------------------------------------------------------------------

    def _check_states(self) -> None:
        """Refuses an optimizer that lacks factors, or whose states cannot be carried over, before anything changes."""
        live = self._search.live
        self._editing.check_held(self._optimizers, {name: layer.factor for name, layer in live.items()})
        if self._config.merge.optimizer_state == "transport":
            for layer in live.values():
                self._editing.check_states(self._optimizer_of(layer), layer.factor, shaped=layer.spec.experts is None)

    def _reason_to_wait(self, seen: bool) -> str:
        """Why this step must not be merged, if so; the same on all ranks. Every rank. One all-reduce.

        Raises:
            RuntimeError: No rank has seen (`seen`: this one has) a layer in a backward pass; on all ranks.
        """
        own = self._search.quality
        told = torch.cat([own, own.new_tensor([float(self._order.was_skipped), float(seen)])])
        broken, alive, without, seeing = self._editing.comm.sum(told).tolist()
        if not seeing:
            raise RuntimeError(NOTHING_SEEN)
        return reason_to_wait(broken, alive, without)

    def _warn(self, text: str) -> None:
        if self._editing.comm.is_main:
            warnings.warn(f"LoQT: {text}", stacklevel=3)

    def _optimizer_of(self, layer: LoQTLayer) -> torch.optim.Optimizer:
        if len(self._optimizers) == 1:  # which may be an engine's, over parameters of its own
            return self._optimizers[0]
        return next(each for each in self._optimizers if any(p is layer.factor for p in parameters_of(each)))

    def _merging(self) -> LayerMerge:
        merge = self._config.merge
        return LayerMerge(
            self._layers, self._editing, merge, self._initial_weights, self._first_due, optimizer_of=self._optimizer_of
        )
