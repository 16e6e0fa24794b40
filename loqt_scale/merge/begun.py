"""A merge under way: the layers that are merged already, so that one that an error has ended can be taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.one_layer import NUMBERS, LayerMerge
from loqt_scale.merge.placed import InitialWeights
from loqt_scale.merge.subspace import SubspaceSearch
from loqt_scale.merge.turns import Change, in_turns
from loqt_scale.strategies import Editing


@dataclass
class BegunMerge:
    """See the module's docstring.

    Args:
        sketch_bytes: Payload of what was reduced to the layers' owners.
        diagnostics: Of the layers that are merged, as `LayerMerge.run` returns them.
        kept: Names of what stays as it is.
    """

    sketch_bytes: int
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def merge_rest(
        self, layers: Mapping[str, LoQTLayer], search: SubspaceSearch, merging: LayerMerge, editing: Editing
    ) -> None:
        """Merges all layers that are not merged yet; those that do not train stay as they are. Every rank."""

        def find(name: str, source: InitialWeights | None) -> Change:
            return merging.run(name, search.owners[name], search.found(name), source)

        def finish(name: str, replica: int, change: Change) -> None:
            merging.carry(name, replica, change)
            search.forget(name)
            self.kept += merging.stays(name, change)
            self.diagnostics[name] = change.numbers

        rest = [name for name in search.owners if name not in self.diagnostics]
        live = {name: search.owners[name] for name in rest if name in search.live and layers[name].factor.requires_grad}
        for name in (name for name in rest if name not in live):
            finish(name, 0, merging.rest(name))
        in_turns(layers, live, merging.source, editing, numbers=NUMBERS, find=find, finish=finish)

    def read(self, editing: Editing) -> dict[str, list[float]]:
        """All layers' diagnostics on the host, their last two numbers summed over shards at once. Every rank."""
        table = torch.stack(list(self.diagnostics.values()))
        change, square = editing.sum(table[:, -2:].contiguous()).unbind(1)
        survival = torch.where(square > 0, 1.0 + change / square, float("nan"))
        rows = torch.cat([table[:, :-2], survival.unsqueeze(1)], dim=1).tolist()
        return dict(zip(self.diagnostics, rows, strict=True))
