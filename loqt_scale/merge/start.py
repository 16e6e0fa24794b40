"""A run's start that makes up for the first quantization (`loqt.init: loftq`): P and B before the first step.

Layer by layer each rank reads its rows of W once more from their source and takes part in `functional.loftq`, which
exchanges sums of few columns; nobody ever holds a whole W. The results do not depend on the number of ranks, up to the
order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from loqt_scale.config import LoQTConfig
from loqt_scale.functional.loftq import loftq
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.experts import start_experts
from loqt_scale.merge.placed import InitialWeights, PlacedLayer, initial_rows
from loqt_scale.merge.report import StartReport
from loqt_scale.merge.turns import NEW, Change, Found, in_turns
from loqt_scale.strategies import Editing


@torch.no_grad()
def start_compensated(
    layers: Mapping[str, LoQTLayer],
    owners: Mapping[str, int],
    source: InitialWeights,
    config: LoQTConfig,
    editing: Editing,
    *,
    seed: int,
) -> StartReport:
    """Gives every layer W_q, P and B of LoftQ; a base that is stored exactly stays as it is. Every rank.

    Args:
        layers: All layers by name, filled.
        owners: Rank whose bits of each P count, in the order in which layers are taken.
        source: The weights before quantization, under the names of the unconverted model.
        config: Its `merge.compensation_rounds` are LoftQ's.
        editing: How the model is spread.
        seed: Of the run.
    """
    started, errors, rounds = time.perf_counter(), {}, config.merge.compensation_rounds

    def find(name: str, weights: InitialWeights | None) -> Change:
        layer, owner = layers[name], owners[name]
        placed = PlacedLayer(layer, editing)
        assert weights is not None
        if layer.spec.experts is not None:
            how = {"owner": owner, "rounds": rounds, "seed": seed}
            return start_experts(name, placed, weights, **how, device=editing.device)
        weight = initial_rows(weights, name, layer, *placed.rows).to(editing.device)
        result, packed = loftq(weight, placed.shard(owner), rounds=rounds, seed=stable_seed(seed, name))
        return Change([NEW], torch.stack([result.error_before, result.error]), Found(packed, result))

    def finish(name: str, replica: int, change: Change) -> None:
        errors[name] = change.numbers

    rounded = {name: owner for name, owner in owners.items() if not layers[name].spec.base.kind.exact}
    in_turns(layers, rounded, source, editing, numbers=2, find=find, finish=finish)
    values = torch.stack([*errors.values()]).tolist() if errors else []
    seconds = time.perf_counter() - started
    return StartReport(seconds, {name: (before, after) for name, (before, after) in zip(errors, values, strict=True)})
