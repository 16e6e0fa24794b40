"""One layer's merge: its new P, what W_q and B become (found in one replica), what the optimizer keeps of B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from loqt_scale.config import MergeConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.compensation import add_low_rank, compensate
from loqt_scale.functional.loftq import Residual
from loqt_scale.functional.quantization import unpack
from loqt_scale.functional.transport import basis_rotation, carry_states
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.basis import FoundBasis
from loqt_scale.merge.diagnostics import describe_merge
from loqt_scale.merge.experts import ExpertsMerge, edit_moments, expert_names
from loqt_scale.merge.placed import InitialWeights, PlacedLayer, initial_rows
from loqt_scale.merge.turns import KEPT, NEW, TURNED, Change, Found
from loqt_scale.strategies import Editing, EditStates

NUMBERS = 7  # what `describe_merge` says


class LayerMerge:
    """See the module's docstring.

    Args:
        layers: By name.
        editing: How they are spread over ranks.
        merge: Rounds of compensation, and what becomes of the optimizer's states.
        source: The weights before quantization, if they are known.
        first_due: Layers whose first merge this is, though their P has values.
        optimizer_of: Who updates a layer's B.
    """

    def __init__(
        self,
        layers: Mapping[str, LoQTLayer],
        editing: Editing,
        merge: MergeConfig,
        source: InitialWeights | None,
        first_due: Set[str],
        *,
        optimizer_of: Callable[[LoQTLayer], torch.optim.Optimizer],
    ) -> None:
        self._layers, self._editing, self._merge = layers, editing, merge
        self._source, self._first_due, self._optimizer_of = source, first_due, optimizer_of

    @property
    def source(self) -> InitialWeights | None:
        """The weights before quantization, if they are known."""
        return self._source

    def run(self, name: str, owner: int, mine: FoundBasis | None, source: InitialWeights | None) -> Change:
        """Finds what becomes of one layer, and changes nothing.

        Every rank of one replica.

        Args:
            name: The layer's.
            owner: Rank that has found its P; of this replica.
            mine: That P, there.
            source: The weights before quantization, of this layer.

        Returns:
            Its numbers are diagnostics in the order of `MERGE_DIAGNOSTICS`, nan if the layer stays as it is; in place
            of the last, the survival of updates, stand this shard's two sums for it (see `MergeCoordinator.finish`).
        """
        layer = self._layers[name]
        found = self._share_basis(layer, owner, mine)
        if layer.spec.experts is None:
            return self._merge_layer(name, found, source) or self.rest(name)
        merge = ExpertsMerge(
            name,
            PlacedLayer(layer, self._editing),
            found,
            first_due=[expert for expert, own in enumerate(own_names(name, layer)) if own in self._first_due],
            source=source,
            config=self._merge,
            editing=self._editing,
        )
        return merge.run() or self.rest(name)

    def rest(self, name: str) -> Change:
        """What becomes of a layer that stays as it is. Local."""
        nan = torch.full((NUMBERS,), float("nan"), dtype=torch.float32, device=self._editing.device)
        return Change([KEPT] * self._layers[name].spec.expert_count, nan)

    def carry(self, name: str, replica: int, change: Change) -> None:
        """Carries B's moments over, once W_q, P and B of a layer are replaced. Every rank.

        Args:
            name: The layer's.
            replica: That has found what becomes of it.
            change: That.
        """
        if not change.changes:
            return
        layer = self._layers[name]
        turned = [matrix for matrix, fate in enumerate(change.fates) if fate == TURNED]
        rotations = dict(zip(turned, self._rotations(layer, len(turned), replica, change), strict=False))
        if layer.spec.experts is None:
            self._carry_state(layer, rotations.get(0))
        else:
            live = {e: rotations.get(e) for e, fate in enumerate(change.fates) if fate != KEPT}
            self._edit_states(layer, partial(edit_moments, layer, live, self._merge.optimizer_state))

    def stays(self, name: str, change: Change) -> list[str]:
        """Names of what stays as it is: the layer, or some of its experts. Local."""
        names = own_names(name, self._layers[name])
        return [own for own, fate in zip(names, change.fates, strict=True) if fate == KEPT]

    def _rotations(self, layer: LoQTLayer, count: int, replica: int, change: Change) -> Sequence[Tensor]:
        """P_old^T P_new of a layer's matrices that have one: `count` of them; none if nobody needs them. Every rank."""
        if not count or self._merge.optimizer_state != "transport":
            return []
        rank, found = layer.rank, None if change.found is None else change.found.rotations
        flat = None if found is None else found.flatten(0, 1)
        return self._editing.hand_on_whole(flat, (count * rank, rank), replica).view(count, rank, rank).unbind()

    def _merge_layer(self, name: str, found: FoundBasis, source: InitialWeights | None) -> Change | None:
        """What becomes of a layer that is one matrix; None: it stays as it is. Every rank of one replica."""
        layer, editing = self._layers[name], self._editing
        spec, placed = layer.spec, PlacedLayer(layer, editing)
        old_basis = placed.basis()
        # until a layer's first merge P is zero, also after skips and a resume
        had_basis, is_blank = torch.stack([old_basis.any(), found.is_blank]).tolist()
        if had_basis and is_blank:
            return None
        first = name in self._first_due or not had_basis
        old_factor = placed.factor()
        weight = self._merged_rows(name, placed, old_basis, old_factor, source if first else None)
        new_basis = unpack(found.codes, found.scales, spec.projection, torch.float32)
        result = compensate(
            weight,
            spec.base,
            placed.rows_of_basis(new_basis),
            new_basis.T @ new_basis,
            side=spec.side,
            scale=spec.scale,
            rounds=self._merge.compensation_rounds,
            sum_over_shards=editing.sum,
        )
        rotation = basis_rotation(old_basis, new_basis)
        description = describe_merge(
            spec,
            weight,
            result,
            old_FR=old_basis,
            new_FR=new_basis,
            rows_of_basis=placed.rows_of_basis,
            old_factor=old_factor,
            energy=None if is_blank else found.energy,
            kept=found.kept,
            rotation=rotation,
            first_row=placed.rows[0],
            first=first,
            is_known=source is not None,
        )
        tensors = Found((found.codes, found.scales), result, rotation.unsqueeze(0) if had_basis else None)
        return Change([TURNED if had_basis else NEW], description, tensors)

    def _share_basis(self, layer: LoQTLayer, owner: int, mine: FoundBasis | None) -> FoundBasis:
        """Broadcasts an owner's P, packed. Every rank of its replica."""
        spec, comm = layer.spec, self._editing.comm
        if comm.rank == owner:
            assert mine is not None
            row = mine.to_bytes()
        else:
            row = torch.empty(FoundBasis.count_bytes(spec), dtype=torch.uint8, device=comm.device)
        self._editing.broadcast(row, owner)
        return FoundBasis.from_bytes(row, spec)

    def _merged_rows(
        self, name: str, placed: PlacedLayer, basis_FR: Tensor, factor: Tensor, source: InitialWeights | None
    ) -> Tensor:
        """This rank's rows of W = dequant(W_q) + s L(B), float32; in the first merge what that stands for.

        Then W is read from its source, and what training has added to B is added to it: B less what had made up for
        the first quantization (`loqt.init: loftq`), which was the best fit to it. Every rank of one replica.
        """
        spec = placed.layer.spec
        if source is not None:
            weight = initial_rows(source, name, placed.layer, *placed.rows).to(self._editing.device)
            if not bool(basis_FR.any()):  # P and B are zero: there is nothing to add
                return weight
            residual = Residual(placed.shard(), weight, placed.packed_base())
            factor = factor - residual.fit(basis_FR)
        else:
            weight = placed.base()
        add_low_rank(weight, spec.base, placed.rows_of_basis(basis_FR), factor, spec.side, spec.scale)
        return weight

    def _carry_state(self, layer: LoQTLayer, rotation: Tensor | None) -> None:
        """Applies the state policy to B's moments. Every rank."""
        policy = self._merge.optimizer_state
        self._edit_states(layer, lambda _, states: carry_states(states, rotation, policy))

    def _edit_states(self, layer: LoQTLayer, edit: EditStates) -> None:
        """Edits what the optimizer keeps of B; what has no rule is forgotten. Every rank."""
        policy, optimizer = self._merge.optimizer_state, self._optimizer_of(layer)
        if policy == "keep":
            return
        try:
            self._editing.check_states(optimizer, layer.factor, shaped=layer.spec.experts is None)
        except UserError:  # under `reset` only, else the coordinator has refused
            self._editing.forget_states(optimizer, layer.factor)
        else:
            self._editing.edit_moments(optimizer, layer.factor, edit)


def own_names(name: str, layer: LoQTLayer) -> list[str]:
    """Names of the matrices of a layer that are merged each by itself: the layer, or its experts."""
    return [name] if layer.spec.experts is None else expert_names(name, layer.spec.experts)
