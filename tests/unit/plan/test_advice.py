"""What `plan` says to write instead is a run that the settings' own rules allow."""

from __future__ import annotations

import pytest

from loqt_scale.config import LoQTConfig, OptimConfig, OptimizerStates, RunConfig
from loqt_scale.plan.advice import changes


@pytest.mark.parametrize(
    ("rank", "pattern", "states"),
    [(64, {"*.up_proj": 5}, "float32"), (160, {}, "int8"), (224, {"*.down_proj": 96}, "float32")],
)
def test_advice_is_made_of_settings_that_go_together(
    rank: int, pattern: dict[str, int], states: OptimizerStates
) -> None:
    """8-bit states want ranks of 32 or more: one in the pattern is less."""
    config = RunConfig(loqt=LoQTConfig(rank=rank, rank_pattern=pattern), optim=OptimConfig(states=states))
    found = list(changes(config, ranks=1))
    assert ("--optim.states=int8" in found[-1].words) == (rank == 224)
    assert all(change.config.loqt.rank % 32 == 0 for change in found)
