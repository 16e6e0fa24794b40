"""The merge: every rank takes part, one layer at a time, low-rank tensors on the wire.

On a merge step u the trainer calls `prepare(u)` before the forward pass and `finish(u)` after the optimizer step.

    collect    probes gather each layer's weight gradient, sketched (F x l) or dense, in the backward passes, from which
               it is summed into its owner's copy; layers are dealt out over the ranks
    factorise  the owners find their P, at the same time, still inside the last backward pass (`subspace`)

and in `finish`, layer by layer,

    broadcast  P, packed as the layer will hold it, to all
    merge      each rank folds, re-quantizes and compensates its own rows of W (functional.compensation);
               nobody ever holds a whole W
    transport  B's Adam moments into the new basis

`B` is exchanged only where its rows do not coincide with the rank's rows of W (a row group cut by uneven shards):
then it is all-gathered, which is still low-rank. In a layer's first merge, which P of zeros tells, W is read once more
from its source, so that the first quantization's error is compensated too instead of being lost.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import Protocol

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.functional.compensation import Compensated, add_low_rank, compensate, update_survival
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import subspace_overlap
from loqt_scale.functional.quantization import unpack
from loqt_scale.functional.schedule import merge_steps
from loqt_scale.functional.transport import apply_state_policy, basis_rotation
from loqt_scale.layers import LoQTLinear, loqt_layers
from loqt_scale.merge.basis import FoundBasis
from loqt_scale.merge.report import MERGE_DIAGNOSTICS, MergeReport
from loqt_scale.merge.subspace import SubspaceSearch
from loqt_scale.strategies import Strategy


class InitialWeights(Protocol):
    """Where the weights before quantization can be read again (see `weights.WeightSource`)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter, float32."""
        ...


class MergeCoordinator:
    """Runs the merges of a model's LoQT layers.

    Args:
        model: The converted model, its parameters allocated.
        optimizer: Its optimizer; Adam moments of the factors follow `config.merge.optimizer_state`.
        config: The method's settings.
        total_steps: Steps of the run; no merge falls after `last_step_fraction` of it.
        strategy: How the model is spread over ranks. Default: one process.
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
        strategy: Strategy | None = None,
        seed: int = 0,
        initial_weights: InitialWeights | None = None,
    ) -> None:
        self._layers = dict(loqt_layers(model))
        self._optimizer, self._config = optimizer, config
        device = next(iter(self._layers.values())).factor.device
        self._strategy = strategy or Strategy(device)
        self._initial_weights = initial_weights
        merge = config.merge
        last = merge.last_step(total_steps)
        steps = merge_steps(total_steps, gap=merge.gap, schedule=merge.schedule, growth=merge.growth, last_step=last)
        self._schedule, self._steps = steps, set(steps)
        self._search = SubspaceSearch(self._layers, config.subspace, self._strategy, seed)
        self._sent_before = 0  # bytes, by the search, before this merge step

    @property
    def steps(self) -> list[int]:
        """All merge steps of the run, ascending."""
        return sorted(self._steps)

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
        self._search.finish()
        for name, owner in self._search.owners.items():
            with self._strategy.editing(self._layers[name].merged_parameters()):
                diagnostics[name] = self._merge_layer(name, owner, self._search.take(name))
        values = self._read(diagnostics)
        layers = {name: dict(zip(MERGE_DIAGNOSTICS, values[name], strict=True)) for name in self._layers}
        return MergeReport(
            step=step,
            index=bisect_right(self._schedule, step) - 1,
            seconds=time.perf_counter() - started,
            sketch_bytes=sketch_bytes,
            layers=layers,
        )

    def _share_basis(self, layer: LoQTLinear, owner: int, mine: FoundBasis | None) -> tuple[Tensor, Tensor]:
        """Broadcasts an owner's P, stores each rank's part, returns (P as the layer holds it, energy). Every rank."""
        layout, strategy = layer.spec.projection, self._strategy
        if strategy.rank == owner:
            assert mine is not None
            row = mine.to_bytes()
        else:
            row = torch.empty(FoundBasis.count_bytes(layout), dtype=torch.uint8, device=strategy.device)
        strategy.broadcast(row, owner)
        found = FoundBasis.from_bytes(row, layout)
        strategy.store(layer.projection.codes, found.codes)
        if layer.projection.scales is not None and found.scales is not None:
            strategy.store(layer.projection.scales, found.scales)
        return unpack(found.codes, found.scales, layout, torch.float32), found.energy

    def _merge_layer(self, name: str, owner: int, mine: FoundBasis | None) -> Tensor:
        """Merges one layer; returns its diagnostics in the order of `MERGE_DIAGNOSTICS`. Every rank.

        In place of the last, the survival of updates, stand this shard's two sums for it (see `_read`).
        """
        layer, strategy = self._layers[name], self._strategy
        spec = layer.spec
        rows = spec.base.rows_of_groups(*strategy.rows(spec.base.groups))
        old_basis = self._gather_basis(layer)
        merged_before = bool(old_basis.any())  # until a layer's first merge P is zero, also after skips and a resume
        old_factor = self._factor_for_rows(layer, rows)
        new_basis, energy = self._share_basis(layer, owner, mine)
        local_old, local_new = (b if spec.side == "input" else b[slice(*rows)] for b in (old_basis, new_basis))

        weight = self._merged_rows(name, rows, local_old, old_factor, merged_before=merged_before)
        result = compensate(
            weight,
            spec.base,
            local_new,
            new_basis.T @ new_basis,
            side=spec.side,
            scale=spec.scale,
            rounds=self._config.merge.compensation_rounds,
            sum_over_shards=strategy.sum,
        )
        sums = update_survival(
            weight,
            spec.base,
            result,
            new_basis=local_new,
            old_basis=local_old,
            old_factor=old_factor,
            side=spec.side,
            scale=spec.scale,
        )
        self._store(layer, result)
        self._carry_state(layer, basis_rotation(old_basis, new_basis) if merged_before else None)
        nan = energy.new_full((), float("nan"))
        overlap = subspace_overlap(old_basis, new_basis) if merged_before else nan
        return torch.stack([result.error_before, result.error, energy, overlap, *sums])

    def _read(self, diagnostics: dict[str, Tensor]) -> dict[str, list[float]]:
        """All layers' diagnostics on the host, their last two numbers summed over shards at once. Every rank."""
        table = torch.stack(list(diagnostics.values()))
        change, square = self._strategy.sum(table[:, -2:].contiguous()).unbind(1)
        survival = torch.where(square > 0, 1.0 + change / square, float("nan"))
        rows = torch.cat([table[:, :-2], survival.unsqueeze(1)], dim=1).tolist()
        return dict(zip(diagnostics, rows, strict=True))

    def _gather_basis(self, layer: LoQTLinear) -> Tensor:
        """The layer's P on every rank, float32. Every rank."""
        packed = [layer.projection.codes, layer.projection.scales]
        codes, *scales = self._strategy.gather_together([part for part in packed if part is not None])
        return unpack(codes, scales[0] if scales else None, layer.spec.projection, torch.float32)

    def _factor_for_rows(self, layer: LoQTLinear, rows: tuple[int, int]) -> Tensor:
        """B as this rank's rows of W need it: those rows (input side) or all (output side), a copy. Every rank."""
        factor, strategy = layer.factor, self._strategy
        if layer.side == "output":
            return strategy.gather(factor).float().clone()
        if _aligned(layer.spec, strategy):
            return strategy.read(factor).detach().float().clone()
        return strategy.gather(factor)[slice(*rows)].float().clone()

    def _merged_rows(
        self, name: str, rows: tuple[int, int], basis: Tensor, factor: Tensor, *, merged_before: bool
    ) -> Tensor:
        """This rank's rows of W = dequant(W_q) + s L(B), float32; in the first merge the true initial ones. Local."""
        layer = self._layers[name]
        layout = layer.spec.base
        if not merged_before and self._initial_weights is not None:  # P and B are zero: there is nothing to add
            return self._initial_weights.rows(f"{name}.weight", *rows).to(self._strategy.device)
        scales = None if layer.base.scales is None else self._strategy.read(layer.base.scales)
        codes = self._strategy.read(layer.base.codes)
        weight = unpack(codes, scales, layout, torch.float32, rows=rows[1] - rows[0])
        add_low_rank(weight, layout, basis, factor, layer.side, layer.spec.scale)
        return weight

    def _store(self, layer: LoQTLinear, result: Compensated) -> None:
        """Writes a merged shard back. Every rank."""
        strategy, spec = self._strategy, layer.spec
        strategy.write(layer.base.codes, result.codes)
        if layer.base.scales is not None and result.scales is not None:
            strategy.write(layer.base.scales, result.scales)
        if spec.side == "output":
            strategy.store(layer.factor, result.factor)
        elif _aligned(spec, strategy):
            strategy.write(layer.factor, result.factor)
        else:
            ranges = [
                spec.base.rows_of_groups(*strategy.rows(spec.base.groups, rank)) for rank in range(strategy.world_size)
            ]
            strategy.store(layer.factor, strategy.gather_pieces(result.factor, ranges))

    def _carry_state(self, layer: LoQTLinear, rotation: Tensor | None) -> None:
        """Applies the state policy to B's moments. Every rank."""
        policy = self._config.merge.optimizer_state
        self._strategy.edit_moments(
            self._optimizer,
            layer.factor,
            lambda first, second=None: apply_state_policy(first, second, rotation, policy),
        )


def _aligned(spec: LowRankSpec, strategy: Strategy) -> bool:
    """Whether on every rank the rows of B are the rows of W that it works on (so that neither must be exchanged)."""
    return all(
        strategy.rows(spec.base.rows, rank) == spec.base.rows_of_groups(*strategy.rows(spec.base.groups, rank))
        for rank in range(strategy.world_size)
    )
