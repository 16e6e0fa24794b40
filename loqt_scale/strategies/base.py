"""A strategy: how one training run is spread over ranks. It is what four parts make together, over the same ranks:

    comm        how do ranks talk                                            `comm.Comm`
    placement   who stores which rows of a parameter                         `placement.Placement`
    step        who reads which sequences; how are gradients summed, applied `step.Step`
    editing     how are parameters and moments read and replaced, by rows    `editing.Editing`

Each part is used without the others: the loop takes `step`, merges and checkpoints `editing`, the optimizer
`placement`. The strategy is made once (`create`); nobody tests for "is there one GPU?" afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import Editing
from loqt_scale.strategies.placement import Placement
from loqt_scale.strategies.step import Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """See the module's docstring.

    Args:
        description: The strategy in a word or three, for people.
        comm: The ranks.
        placement: Where parameters lie.
        step: The optimizer step.
        editing: Parameters and moments, read and replaced.
    """

    description: str
    comm: Comm
    placement: Placement
    step: Step
    editing: Editing

    def run_files(self) -> Mapping[str, str]:
        """Texts for the run's folder, by file name: what a foreign engine was told, say. Once the model is wrapped."""
        return {}

    def close(self) -> None:
        """Lets go of what the strategy has joined and started. Every rank."""
        self.comm.close()
