"""A merge under way: the layers that are merged already, so that one that an error has ended can be taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.one_layer import LayerMerge
from loqt_scale.merge.subspace import SubspaceSearch
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
        for name, owner in search.owners.items():
            if name in self.diagnostics:
                continue
            layer = layers[name]
            if name not in search.live or not layer.factor.requires_grad:
                merged, stayed = merging.rest(name)
            else:
                with editing.open(layer.merged_parameters()):
                    merged, stayed = merging.run(name, owner, search.found(name))
            search.forget(name)
            self.kept += stayed
            self.diagnostics[name] = merged

    def read(self, editing: Editing) -> dict[str, list[float]]:
        """All layers' diagnostics on the host, their last two numbers summed over shards at once. Every rank."""
        table = torch.stack(list(self.diagnostics.values()))
        change, square = editing.sum(table[:, -2:].contiguous()).unbind(1)
        survival = torch.where(square > 0, 1.0 + change / square, float("nan"))
        rows = torch.cat([table[:, :-2], survival.unsqueeze(1)], dim=1).tolist()
        return dict(zip(self.diagnostics, rows, strict=True))
