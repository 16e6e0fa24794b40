"""The merge: every rank takes part, one layer at a time, low-rank tensors on the wire.

On a merge step u the trainer calls `prepare(u)` before the forward pass and `finish(u)` after the optimizer step.

    collect    probes gather each layer's weight gradient, sketched (F x l) or dense, in the backward passes, from which
               it is summed into its owner's copy; layers are dealt out over the ranks
    factorise  the owners find their P, at the same time, still inside the last backward pass (`subspace`)

and in `finish`, layer by layer,

    broadcast  P, packed as the layer will hold it, to all
    merge      each rank folds, re-quantizes and compensates its own rows of W (functional.compensation);
               nobody ever holds a whole W
    transport  the optimizer's moments of B into the new basis

`B` is exchanged only where its rows do not coincide with the rank's rows of W (a row group cut by uneven shards):
then it is all-gathered, which is still low-rank. In a layer's first merge, which P of zeros tells (or, after a start
that has made up for quantization, that there was no update before), W is read once more from its source, so that the
first quantization's error is compensated too instead of being lost.

A layer whose gradient is zero on all ranks (an expert that got no token, a dropped layer, an unused head) keeps its P,
B, W_q and moments as they are until the next merge. If it has no P yet, it gets a random one, or it would not learn.
"""

from __future__ import annotations

import time
from bisect import bisect_right

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.functional.compensation import add_low_rank, compensate, update_survival
from loqt_scale.functional.loftq import Residual
from loqt_scale.functional.projection import subspace_overlap
from loqt_scale.functional.quantization import unpack
from loqt_scale.functional.schedule import merge_steps
from loqt_scale.functional.transport import apply_state_policy, basis_rotation
from loqt_scale.layers import LoQTLinear, loqt_layers
from loqt_scale.merge.basis import FoundBasis
from loqt_scale.merge.collection import NOTHING_SEEN
from loqt_scale.merge.placed import InitialWeights, PlacedLayer
from loqt_scale.merge.report import MERGE_DIAGNOSTICS, MergeReport, StartReport
from loqt_scale.merge.start import start_compensated
from loqt_scale.merge.subspace import SubspaceSearch
from loqt_scale.strategies import Editing, single_process


class MergeCoordinator:
    """Runs the merges of a model's LoQT layers.

    Args:
        model: The converted model, its parameters allocated.
        optimizer: Its optimizer; its moments of the factors follow `config.merge.optimizer_state`.
        config: The method's settings.
        total_steps: Steps of the run; no merge falls after `last_step_fraction` of it.
        editing: How the model is spread over ranks (a strategy's `editing`). Default: one process.
        seed: Seed of the sketches.
        initial_weights: Source of the weights before quantization, under the names of the unconverted model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: LoQTConfig,
        *,
        total_steps: int,
        editing: Editing | None = None,
        seed: int = 0,
        initial_weights: InitialWeights | None = None,
    ) -> None:
        self._layers = dict(loqt_layers(model))
        self._optimizer, self._config = optimizer, config
        device = next(iter(self._layers.values())).factor.device
        self._editing = editing or single_process(device).editing
        self._initial_weights = initial_weights
        merge = config.merge
        last = merge.last_step(total_steps)
        steps = merge_steps(total_steps, gap=merge.gap, schedule=merge.schedule, growth=merge.growth, last_step=last)
        self._schedule, self._steps = steps, set(steps)
        self._search = SubspaceSearch(self._layers, config.subspace, self._editing.comm, seed)
        self._sent_before = 0  # bytes, by the search, before this merge step
        self._seed = seed
        self._first_due: set[str] = set()  # layers; of others P of zeros tells it

    @property
    def steps(self) -> list[int]:
        """All merge steps of the run, ascending."""
        return sorted(self._steps)

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

    def expect_first_merge(self) -> None:
        """Says that no merge has been made yet (on a resume; P of zeros says so by itself). Local."""
        self._first_due = set(self._layers)

    def is_merge_step(self, step: int) -> bool:
        """Whether a merge follows the optimizer step `step`."""
        return step in self._steps

    def require(self, step: int) -> None:
        """Makes a step a merge step, if it is none (a merge was postponed to it before a resume). Local."""
        self._steps.add(step)

    def postpone(self, step: int) -> None:
        """Moves the merge of a step that was skipped to the next step, and drops what was collected. Every rank.

        If the next step ends in a merge anyway, the two are one.
        """
        self._steps.remove(step)
        self._steps.add(step + 1)
        self._search.drop()

    def prepare(self, step: int, *, backward_passes: int | None = None) -> None:
        """Before the forward passes of a step: attaches probes if the step ends in a merge.

        Args:
            step: The step.
            backward_passes: How many will follow. If given, each sends what it has collected to the layers' owners,
                which factorise it in the last one: every rank, and all must agree that this is a merge step. If not,
                this is done in `finish`, and until then every rank holds what all layers have collected.
        """
        if self.is_merge_step(step):
            self._sent_before = self._search.sent_bytes
            self._search.attach(step, backward_passes)

    @torch.no_grad()
    def finish(self, step: int) -> MergeReport | None:
        """After the optimizer step: merges all layers if the step is a merge step, else does nothing. Every rank."""
        if not self.is_merge_step(step):
            return None
        started = time.perf_counter()
        diagnostics: dict[str, Tensor] = {}
        sketch_bytes = self._search.sent_bytes - self._sent_before
        seen, blank, kept = self._search.finish(), 0, []
        for name, owner in self._search.owners.items():
            with self._editing.open(self._layers[name].merged_parameters()):
                merged, is_blank = self._merge_layer(name, owner, self._search.take(name))
            blank += is_blank
            if merged is None:
                kept.append(name)
            diagnostics[name] = (
                torch.full((6,), float("nan"), device=self._editing.device) if merged is None else merged
            )
        if not seen and blank == len(self._layers):
            raise RuntimeError(NOTHING_SEEN)
        self._first_due &= set(kept)
        values = self._read(diagnostics)
        layers = {name: dict(zip(MERGE_DIAGNOSTICS, values[name], strict=True)) for name in self._layers}
        return MergeReport(
            step=step,
            index=bisect_right(self._schedule, step) - 1,
            seconds=time.perf_counter() - started,
            sketch_bytes=sketch_bytes,
            layers=layers,
            kept=tuple(kept),
        )

    def _merge_layer(self, name: str, owner: int, mine: FoundBasis | None) -> tuple[Tensor | None, bool]:
        """Merges one layer; returns its diagnostics, None if it stays as it is, and whether it has no gradient.

        They have the order of `MERGE_DIAGNOSTICS`; in place of the last, the survival of updates, stand this shard's
        two sums for it (see `_read`). Every rank.
        """
        layer, editing = self._layers[name], self._editing
        spec, placed = layer.spec, PlacedLayer(layer, editing)
        old_basis, found = placed.basis(), self._share_basis(layer, owner, mine)
        # until a layer's first merge P is zero, also after skips and a resume
        had_basis, is_blank = torch.stack([old_basis.any(), found.is_blank]).tolist()
        if had_basis and is_blank:
            return None, True
        first = name in self._first_due or not had_basis
        old_factor = placed.factor()
        weight = self._merged_rows(name, placed, old_basis, old_factor, first=first)
        placed.store_basis(found.codes, found.scales)
        new_basis = unpack(found.codes, found.scales, spec.projection, torch.float32)
        local_old, local_new = placed.rows_of_basis(old_basis), placed.rows_of_basis(new_basis)

        result = compensate(
            weight,
            spec.base,
            local_new,
            new_basis.T @ new_basis,
            side=spec.side,
            scale=spec.scale,
            rounds=self._config.merge.compensation_rounds,
            sum_over_shards=editing.sum,
        )
        sums = update_survival(
            weight,
            spec.base,
            result,
            new_basis=local_new,
            old_basis=local_old,
            old_factor=torch.zeros_like(old_factor) if first else old_factor,
            side=spec.side,
            scale=spec.scale,
        )
        placed.store(result)
        self._carry_state(layer, basis_rotation(old_basis, new_basis) if had_basis else None)
        nan = found.energy.new_full((), float("nan"))
        energy, overlap = nan if is_blank else found.energy, nan if first else subspace_overlap(old_basis, new_basis)
        return torch.stack([result.error_before, result.error, energy, overlap, *sums]), is_blank

    def _read(self, diagnostics: dict[str, Tensor]) -> dict[str, list[float]]:
        """All layers' diagnostics on the host, their last two numbers summed over shards at once. Every rank."""
        table = torch.stack(list(diagnostics.values()))
        change, square = self._editing.sum(table[:, -2:].contiguous()).unbind(1)
        survival = torch.where(square > 0, 1.0 + change / square, float("nan"))
        rows = torch.cat([table[:, :-2], survival.unsqueeze(1)], dim=1).tolist()
        return dict(zip(diagnostics, rows, strict=True))

    def _share_basis(self, layer: LoQTLinear, owner: int, mine: FoundBasis | None) -> FoundBasis:
        """Broadcasts an owner's P, packed. Every rank."""
        layout, comm = layer.spec.projection, self._editing.comm
        if comm.rank == owner:
            assert mine is not None
            row = mine.to_bytes()
        else:
            row = torch.empty(FoundBasis.count_bytes(layout), dtype=torch.uint8, device=comm.device)
        comm.broadcast(row, owner)
        return FoundBasis.from_bytes(row, layout)

    def _merged_rows(self, name: str, placed: PlacedLayer, basis_FR: Tensor, factor: Tensor, *, first: bool) -> Tensor:
        """This rank's rows of W = dequant(W_q) + s L(B), float32; in the first merge what that stands for. Every rank.

        Then W is read from its source, and what training has added to B is added to it: B less what had made up for
        the first quantization (`loqt.init: loftq`), which was the best fit to it.
        """
        spec = placed.layer.spec
        if first and self._initial_weights is not None:
            weight = self._initial_weights.rows(f"{name}.weight", *placed.rows).to(self._editing.device)
            if not bool(basis_FR.any()):  # P and B are zero: there is nothing to add
                return weight
            residual = Residual(placed.shard(), weight, placed.packed_base())
            factor = factor - residual.fit(basis_FR)
        else:
            weight = placed.base()
        add_low_rank(weight, spec.base, placed.rows_of_basis(basis_FR), factor, spec.side, spec.scale)
        return weight

    def _carry_state(self, layer: LoQTLinear, rotation: Tensor | None) -> None:
        """Applies the state policy to B's moments. Every rank."""
        policy = self._config.merge.optimizer_state
        self._editing.edit_moments(
            self._optimizer,
            layer.factor,
            lambda first, second=None: apply_state_policy(first, second, rotation, policy),
        )
