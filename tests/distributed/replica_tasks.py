"""HSDP, 2 x 2: who merges which layer, who reads which rows, and what an error in one replica leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from loqt_scale.merge.initial_weights import WeightsInMemory
from loqt_scale.merge.one_layer import LayerMerge
from tests.distributed.adopted_tasks import STEPS, Loop, make_loop


@dataclass
class Noted:
    """What this rank has done: the layers that it has merged, in their order, and how many rows it has read.

    Args:
        fails_at: The merge of a layer, counted from 0, that ends in an error instead.
    """

    fails_at: int | None = None
    merged: list[str] = field(default_factory=list)
    rows: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Takes notes inside the block."""
        run, rows = LayerMerge.run, WeightsInMemory.rows

        def noted_run(merge: LayerMerge, name: str, *rest: Any) -> Any:
            self.merged.append(name)
            if len(self.merged) - 1 == self.fails_at:
                raise MemoryError("no room")
            return run(merge, name, *rest)

        def noted_rows(source: WeightsInMemory, name: str, start: int, stop: int) -> Tensor:
            self.rows += stop - start
            return rows(source, name, start, stop)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerMerge, "run", noted_run)
            patch.setattr(WeightsInMemory, "rows", noted_rows)
            yield


def shared_over_replicas() -> dict[str, Any]:
    """A loop, and the same one whose second replica once cannot merge its second layer of the second merge. Every rank.

    In the other loop the weights before quantization lie elsewhere than the model, on all ranks.
    """
    dist.init_process_group("gloo")
    whole, broken = Noted(), Noted(fails_at=3 if dist.get_rank() >= 2 else None)
    with whole.watching():
        loop = make_loop("hsdp", "nf4")
        loop.steps(0, STEPS)
    with broken.watching():
        other = make_loop("hsdp", "nf4", scattered=True)
        told = _taken_up(other)
    kept = [_bits(each) for each in (loop, other)]
    return {
        "bits": kept[0],
        "merged": whole.merged,
        "merged with an error": broken.merged,
        "rows": whole.rows,
        "told": told,
        "same": kept[0] == kept[1] and loop.losses[6:] == other.losses[5:] and _layers(loop) == _layers(other),
    }


def _taken_up(loop: Loop) -> str:
    """Trains to the end, and takes the merge of step 5 up again after its error, whose words are returned."""
    told = ""
    loop.steps(0, 5)
    try:
        loop.steps(5, 6)
    except (MemoryError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    loop.reports.append(loop.merges.finish())
    loop.optimizer.zero_grad()
    loop.steps(6, STEPS)
    return told


def _bits(loop: Loop) -> str:
    """A digest of the parameters and moments that this rank stores."""
    moments = [state[key] for state in loop.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    stored = [tensor.detach().to_local().numpy().tobytes() for tensor in (*loop.model.parameters(), *moments)]
    return hashlib.sha256(b"".join(stored)).hexdigest()


def _layers(loop: Loop) -> str:
    """What its merges say of each layer; nan is nan."""
    return str([report.layers for report in loop.reports if report is not None])
