"""The merge of a layer of experts: each expert is a matrix of its own, all of them are merged at the same time.

The E matrices lie one below the other, and ranks share out the rows of that tall matrix; so a rank has rows of some of
the experts. What ranks have to add up in a round of compensation is one sum for all experts (`in_step`), P comes in one
broadcast, and W_q and B are written once. An expert whose gradient is zero on all ranks, because no token went to it,
keeps its P, B, W_q and moments; without a P it gets a random one, as any other layer does (see `coordinator`).
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from loqt_scale.config import MergeConfig, StatePolicy
from loqt_scale.functional.compensation import Compensated, add_low_rank, compensation, in_step
from loqt_scale.functional.loftq import Packed, Residual, loftq
from loqt_scale.functional.quantization import unpack
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.functional.transport import StateKind, basis_rotation, carry_states
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.basis import FoundBasis
from loqt_scale.merge.diagnostics import describe_merge
from loqt_scale.merge.placed import InitialWeights, PlacedLayer, initial_rows
from loqt_scale.merge.turns import KEPT, NEW, TURNED, Change, Found
from loqt_scale.strategies import Editing, whole_shape


def expert_names(name: str, experts: int) -> list[str]:
    """What reports call the experts of a layer."""
    return [f"{name}[{expert}]" for expert in range(experts)]


class ExpertsMerge:
    """One merge of one layer. Every rank of one replica.

    Args:
        name: The layer's.
        placed: The layer as it is spread.
        found: The new P of all experts, on every rank of it.
        first_due: Experts whose first merge this is, whatever their P says.
        source: The weights before quantization, if they are known.
        config: The merge's settings.
        editing: How the model is spread.
    """

    def __init__(
        self,
        name: str,
        placed: PlacedLayer,
        found: FoundBasis,
        *,
        first_due: Collection[int],
        source: InitialWeights | None,
        config: MergeConfig,
        editing: Editing,
    ) -> None:
        self._name, self._placed, self._found = name, placed, found
        self._source, self._config, self._editing = source, config, editing
        self._spec, self._each = placed.layer.spec, placed.layer.spec.each
        self._old_packed = placed.packed_basis()
        self._old = self._bases(self._old_packed)
        had, blank = torch.stack([self._old.flatten(1).any(1), found.is_blank]).tolist()
        self._had, self._blank, self._base = had, blank, placed.packed_base()
        self._kept = [expert for expert, pair in enumerate(zip(had, blank, strict=True)) if all(pair)]
        self._first = [not had[expert] or expert in first_due for expert in range(len(had))]

    def run(self) -> Change | None:
        """What becomes of the layer, nothing of which is changed yet; None: all of it stays as it is.

        Its numbers are as those of one layer (see `coordinator`): means over the experts.
        """
        live = [expert for expert in range(self._spec.expert_count) if expert not in self._kept]
        if not live:
            return None
        self._keep_old_bases()
        new = self._bases((self._found.codes, self._found.scales))
        old_factor, weights = self._placed.factor(), self._unpacked_base()
        results = in_step([self._start(e, weights, old_factor, new[e]) for e in live], self._editing.sum)
        rotations = {expert: basis_rotation(self._old[expert], new[expert]) for expert in live}
        table = torch.stack(
            [
                self._describe(expert, result, weights, old_factor, new[expert], rotations[expert])
                for expert, result in zip(live, results, strict=True)
            ]
        )
        numbers = torch.cat([table[:, :-2].nanmean(0), table[:, -2:].sum(0)])
        turned = [rotation for expert, rotation in rotations.items() if self._had[expert]]
        packed = (self._found.codes, self._found.scales)
        found = Found(packed, self._joined(live, results, old_factor), torch.stack(turned) if turned else None)
        return Change([self._fate(expert) for expert in range(self._spec.expert_count)], numbers, found)

    def _fate(self, expert: int) -> int:
        if expert in self._kept:
            return KEPT
        return TURNED if self._had[expert] else NEW

    @property
    def _factor_rows(self) -> int:
        return factor_rows(self._placed.layer)

    def _bases(self, packed: Packed) -> Tensor:
        dense = unpack(*packed, self._spec.projection, torch.float32)
        return dense.view(self._spec.expert_count, -1, dense.shape[1])

    def _unpacked_base(self) -> Tensor:
        """This rank's rows of dequant(W_q) of all experts, float32."""
        rows = self._placed.rows[1] - self._placed.rows[0]
        return unpack(*self._base, self._spec.base, torch.float32, rows=rows)

    def _keep_old_bases(self) -> None:
        """Gives kept experts their old P in what was found."""
        for old, new in zip(self._old_packed, (self._found.codes, self._found.scales), strict=True):
            if old is not None and new is not None and self._kept:
                new.view(self._spec.expert_count, -1)[self._kept] = old.view(self._spec.expert_count, -1)[self._kept]

    def _rows(self, expert: int) -> tuple[slice, slice]:
        """This rank's rows of an expert: within the expert, and within what this rank has of all."""
        start, stop = self._placed.rows
        size = self._each.base.rows
        first, last = (min(max(edge - expert * size, 0), size) for edge in (start, stop))
        offset = expert * size - start
        return slice(first, last), slice(first + offset, last + offset) if last > first else slice(0, 0)

    def _factor(self, expert: int, factor: Tensor) -> Tensor:
        """An expert's B, as this rank's rows need it: those rows (input side), or all of it."""
        if self._each.side == "input":
            return factor[self._rows(expert)[1]]
        return factor[expert * self._factor_rows : (expert + 1) * self._factor_rows]

    def _basis(self, expert: int, basis_FR: Tensor) -> Tensor:
        """An expert's P likewise: all of it (input side), or those rows."""
        return basis_FR if self._each.side == "input" else basis_FR[self._rows(expert)[0]]

    def _start(
        self, expert: int, weights: Tensor, old_factor: Tensor, new_FR: Tensor
    ) -> Generator[Tensor, Tensor, Compensated]:
        """Folds an expert's update into its rows of `weights`, in place; returns its rounds of compensation."""
        spec, old = self._each, self._old[expert]
        weight, factor = weights[self._rows(expert)[1]], self._factor(expert, old_factor)
        if self._first[expert] and self._source is not None:
            start = self._placed.rows[0] + self._rows(expert)[1].start
            rows = initial_rows(self._source, self._name, self._placed.layer, start, start + weight.shape[0])
            weight.copy_(rows)
            if self._had[expert]:
                residual = Residual(self._placed.shard(expert=expert), weight, self._groups(expert, self._base))
                factor = factor - residual.fit(old)
        add_low_rank(weight, spec.base, self._basis(expert, old), factor, spec.side, spec.scale)
        gram = new_FR.T @ new_FR
        rounds = self._config.compensation_rounds
        basis = self._basis(expert, new_FR)
        return compensation(weight, spec.base, basis, gram, side=spec.side, scale=spec.scale, rounds=rounds)

    def _groups(self, expert: int, packed: Packed) -> Packed:
        """An expert's part of this rank's packed rows."""
        rows, size = self._rows(expert)[1], self._each.base.group_rows
        codes, scales = packed
        groups = slice(rows.start // size, rows.stop // size)
        return codes[groups], None if scales is None else scales[groups]

    def _describe(
        self,
        expert: int,
        result: Compensated,
        weights: Tensor,
        old_factor: Tensor,
        new: Tensor,
        rotation: Tensor,
    ) -> Tensor:
        """An expert's diagnostics, as of a layer."""
        return describe_merge(
            self._each,
            weights[self._rows(expert)[1]],
            result,
            old_FR=self._old[expert],
            new_FR=new,
            rows_of_basis=partial(self._basis, expert),
            old_factor=self._factor(expert, old_factor),
            energy=None if self._blank[expert] else self._found.energy[expert],
            kept=self._found.kept[expert],
            rotation=rotation,
            first_row=self._rows(expert)[0].start,
            first=self._first[expert],
            is_known=self._source is not None,
        )

    def _joined(self, live: Sequence[int], results: Sequence[Compensated], old_factor: Tensor) -> Compensated:
        """W_q and B of all experts, this rank's rows."""
        codes, scales = (None if part is None else part.clone() for part in self._base)
        assert codes is not None
        for expert, result in zip(live, results, strict=True):
            own_codes, own_scales = self._groups(expert, (codes, scales))
            own_codes.copy_(result.codes)
            if own_scales is not None and result.scales is not None:
                own_scales.copy_(result.scales)
            self._factor(expert, old_factor).copy_(result.factor)
        nothing = old_factor.new_zeros(())
        return Compensated(codes, scales, old_factor, nothing, nothing)


def factor_rows(layer: LoQTLayer) -> int:
    """Rows of B of one expert, whatever of B this rank holds."""
    return whole_shape(layer.factor)[0] // layer.spec.expert_count


def edit_moments(
    layer: LoQTLayer,
    rotations: dict[int, Tensor | None],
    policy: StatePolicy,
    start: int,
    states: Sequence[tuple[StateKind, Tensor]],
) -> None:
    """Carries each merged expert's states into its new basis.

    Args:
        layer: The layer.
        rotations: P_old^T P_new of each expert that is not kept; None: there was no P_old.
        policy: See `carry_states`.
        start: First row of B of these states.
        states: Their rows.
    """
    rows = factor_rows(layer)
    for expert, rotation in rotations.items():
        for kind, state in states:
            edges = (min(max(edge - start, 0), state.shape[0]) for edge in (expert * rows, (expert + 1) * rows))
            mine = slice(*edges)
            if mine.stop > mine.start:
                carry_states([(kind, state[mine])], rotation, policy)


def start_experts(
    name: str, placed: PlacedLayer, source: InitialWeights, *, owner: int, rounds: int, seed: int, device: torch.device
) -> Change:
    """W_q, P and B of LoftQ of each expert, the errors of quantization and now, means. Every rank of one replica.

    Args:
        name: The layer's.
        placed: The layer as it is spread.
        source: The weights before quantization.
        owner: Rank whose bits of P count.
        rounds: LoftQ's.
        seed: Of the run.
        device: Where this rank computes.
    """
    layer, each = placed.layer, placed.layer.spec.each
    results, bases, errors = [], [], []
    for expert, own_name in enumerate(expert_names(name, layer.spec.expert_count)):
        first, last = (min(max(edge, expert * each.base.rows), (expert + 1) * each.base.rows) for edge in placed.rows)
        weight = initial_rows(source, name, layer, first, last).to(device)
        result, packed = loftq(weight, placed.shard(owner, expert), rounds=rounds, seed=stable_seed(seed, own_name))
        results.append(result)
        bases.append(packed)
        errors.append(torch.stack([result.error_before, result.error]))
    factor = torch.cat([result.factor for result in results])
    nothing = factor.new_zeros(())
    codes, scales = _joined([result.codes for result in results]), _joined([result.scales for result in results])
    basis, basis_scales = (_joined([packed[part] for packed in bases]) for part in (0, 1))
    assert codes is not None and basis is not None
    found = Found((basis, basis_scales), Compensated(codes, scales, factor, nothing, nothing))
    return Change([NEW] * layer.spec.expert_count, torch.stack(errors).mean(0), found)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if whole else None
