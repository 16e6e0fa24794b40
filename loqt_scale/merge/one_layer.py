"""One layer's merge: its new P, what W_q and B become, what the optimizer keeps of B. Every rank, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

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
from loqt_scale.merge.experts import ExpertsMerge, expert_names
from loqt_scale.merge.placed import InitialWeights, PlacedLayer, initial_rows
from loqt_scale.merge.sources import of_layer
from loqt_scale.strategies import Editing, EditStates


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

    def run(self, name: str, owner: int, mine: FoundBasis | None) -> tuple[Tensor, list[str]]:
        """Merges one layer, inside `editing.open` of its parameters. Every rank.

        Args:
            name: The layer's.
            owner: Rank that has found its P.
            mine: That P, there.

        Returns:
            Diagnostics in the order of `MERGE_DIAGNOSTICS`, nan if the layer stays as it is; in place of the last, the
            survival of updates, stand this shard's two sums for it (see `MergeCoordinator.finish`). And the names of
            what stays: the layer, or some of its experts.
        """
        if self._layers[name].spec.experts is not None:
            merged, stays = self._merge_experts(name, owner, mine)
        else:
            merged = self._merge_layer(name, owner, mine)
            stays = [name] if merged is None else []
        return self.rest(name)[0] if merged is None else merged, stays

    def rest(self, name: str) -> tuple[Tensor, list[str]]:
        """What `run` returns of a layer that stays as it is. Local."""
        nan = torch.full((6,), float("nan"), dtype=torch.float32, device=self._editing.device)
        return nan, own_names(name, self._layers[name])

    def _merge_experts(self, name: str, owner: int, mine: FoundBasis | None) -> tuple[Tensor | None, list[str]]:
        """Diagnostics, None if all experts stay as they are, and the names of those that do. Every rank."""
        layer, editing = self._layers[name], self._editing
        names = own_names(name, layer)
        merged = ExpertsMerge(
            name,
            PlacedLayer(layer, editing),
            self._share_basis(layer, owner, mine),
            first_due=[expert for expert, own in enumerate(names) if own in self._first_due],
            source=self._source,
            config=self._merge,
            editing=editing,
        ).run()
        self._edit_states(layer, merged.edit)
        return merged.diagnostics, [names[expert] for expert in merged.kept]

    def _merge_layer(self, name: str, owner: int, mine: FoundBasis | None) -> Tensor | None:
        """Diagnostics, None if the layer stays as it is. Every rank."""
        layer, editing = self._layers[name], self._editing
        spec, placed = layer.spec, PlacedLayer(layer, editing)
        old_basis, found = placed.basis(), self._share_basis(layer, owner, mine)
        # until a layer's first merge P is zero, also after skips and a resume
        had_basis, is_blank = torch.stack([old_basis.any(), found.is_blank]).tolist()
        if had_basis and is_blank:
            return None
        first = name in self._first_due or not had_basis
        old_factor = placed.factor()
        weight = self._merged_rows(name, placed, old_basis, old_factor, first=first)
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
        description = describe_merge(
            spec,
            weight,
            result,
            old_FR=old_basis,
            new_FR=new_basis,
            rows_of_basis=placed.rows_of_basis,
            old_factor=old_factor,
            energy=None if is_blank else found.energy,
            first=first,
            is_known=self._source is not None,
        )
        placed.store_basis(found.codes, found.scales)  # nothing has been changed up to here
        placed.store(result)
        self._carry_state(layer, basis_rotation(old_basis, new_basis) if had_basis else None)
        return description

    def _share_basis(self, layer: LoQTLayer, owner: int, mine: FoundBasis | None) -> FoundBasis:
        """Broadcasts an owner's P, packed. Every rank."""
        spec, comm = layer.spec, self._editing.comm
        if comm.rank == owner:
            assert mine is not None
            row = mine.to_bytes()
        else:
            row = torch.empty(FoundBasis.count_bytes(spec), dtype=torch.uint8, device=comm.device)
        comm.broadcast(row, owner)
        return FoundBasis.from_bytes(row, spec)

    def _merged_rows(self, name: str, placed: PlacedLayer, basis_FR: Tensor, factor: Tensor, *, first: bool) -> Tensor:
        """This rank's rows of W = dequant(W_q) + s L(B), float32; in the first merge what that stands for. Every rank.

        Then W is read from its source, and what training has added to B is added to it: B less what had made up for
        the first quantization (`loqt.init: loftq`), which was the best fit to it.
        """
        spec = placed.layer.spec
        if first and self._source is not None:
            source = of_layer(self._source, name, placed.layer)
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
