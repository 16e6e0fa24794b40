"""Whether the weights before quantization are those that a model's layers were quantized from; when they are let go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from loqt_scale.errors import UserError
from loqt_scale.functional.quantization import pack, unpack
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.initial_weights import TAKE_BEFORE, WeightsInMemory, as_initial_weights, of_layer
from loqt_scale.merge.one_layer import own_names
from loqt_scale.merge.placed import InitialWeights, PlacedLayer, initial_rows
from loqt_scale.merge.settings import differences
from loqt_scale.strategies import Comm, Editing

SAMPLE_ROWS = 32  # of a layer, on each rank
TOLERANCE = 0.05  # an estimate: bfloat16 beside float32 weights should pass; another model's differ by 1 and more


def agreed_source(
    given: Any, layers: Mapping[str, LoQTLayer], prefix: str, comm: Comm, settings: Mapping[str, Any]
) -> InitialWeights | None:
    """`as_initial_weights` if all ranks have given the same kind of thing, and have the same settings. Every rank.

    Raises:
        UserError: As `as_initial_weights`, on all ranks; or ranks gave different kinds, which would hang, or different
            settings, which would hang or make sums of different sketches.
    """
    source, error = None, None
    try:
        source = as_initial_weights(given, layers, prefix)
    except UserError as exception:  # the others wait
        error = exception
    told = comm.gather_objects((None if error is None else str(error), _kind(given), settings))
    if error is not None:
        raise error
    for rank, (refusal, kind, theirs) in enumerate(told):
        if refusal is not None:
            raise UserError(f"rank {rank}: {refusal}")
        if kind != told[0][1]:
            raise UserError(
                f"initial_weights are {told[0][1]} on rank 0 and {kind} on rank {rank}; give the same on every rank"
            )
        if different := differences(told[0][2], theirs, f"{{0}} is {{1!r}} on rank 0 and {{2!r}} on rank {rank}"):
            raise UserError(f"{'; '.join(different.values())}; give the same on every rank")
    return source


@torch.no_grad()
def check_first_weights(layers: Mapping[str, LoQTLayer], source: InitialWeights, editing: Editing) -> None:
    """Refuses weights from which other codes would come than the layers have; looks at some rows. Every rank.

    Args:
        layers: By name, as they were converted.
        source: The weights before quantization.
        editing: How the model is spread.

    Raises:
        UserError: The layer in which they differ most.
    """
    editing.settle()
    sums = torch.stack([_squares(name, layer, source, editing) for name, layer in layers.items()])
    difference, size = editing.comm.sum(sums).unbind(1)  # over all replicas, which leaves their ratio
    relative = (difference / size.clamp_min(1e-30)).sqrt()
    if bool(relative.max() <= TOLERANCE):
        return
    name = list(layers)[int(relative.nan_to_num(float("inf")).argmax())]
    raise UserError(
        f"initial_weights: {layers[name].weight_name(name)} is not what this model was quantized from (they differ by "
        f"{relative[list(layers).index(name)]:.2f} of its norm), so the first merge would put another model's weights "
        f"into it; take them before the conversion: {TAKE_BEFORE}"
    )


def still_due(source: InitialWeights | None, layers: Mapping[str, LoQTLayer], due: Set[str]) -> InitialWeights | None:
    """A source without the weights of layers that were merged, which in memory are somebody else's. Local.

    Args:
        source: The weights before quantization.
        layers: By name.
        due: Names of layers, and of single experts, whose first merge is still to come.
    """
    if not isinstance(source, WeightsInMemory):
        return source
    names = [layer.weight_name(name) for name, layer in layers.items() if due & set(own_names(name, layer))]
    source.keep(names)
    return source if names else None


def _squares(name: str, layer: LoQTLayer, source: InitialWeights, editing: Editing) -> Tensor:
    """Squared norms of the difference between W_q and the source's W, quantized, and of the greater of both, (2,)."""
    layout = layer.spec.base
    placed = PlacedLayer(layer, editing)
    start, stop = placed.rows
    count = min(stop - start, -(-SAMPLE_ROWS // layout.group_rows) * layout.group_rows)
    codes, scales = placed.packed_base()
    rows = initial_rows(of_layer(source, name, layer), name, layer, start, start + count).to(editing.device)
    groups = -(-count // layout.group_rows)
    part = None if scales is None else scales[:groups]
    ours = unpack(codes[:groups], part, layout, torch.float32, rows=count)
    theirs = unpack(*pack(rows, layout), layout, torch.float32, rows=count)
    return torch.stack([(ours - theirs).square().sum(), torch.maximum(ours.square().sum(), rows.square().sum())])


def _kind(given: Any) -> str:
    if given is None:
        return "none"
    tensors: Iterable[Any] = given.values() if isinstance(given, Mapping) else getattr(given, "parameters", tuple)()
    if any(hasattr(tensor, "placements") for tensor in tensors):
        return "distributed tensors"
    return f"a {type(given).__name__}" if hasattr(given, "rows") else "whole tensors"
