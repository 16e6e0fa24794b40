"""Ranks at different steps are found out; what ranks tell each other survives being summed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.training.agreement import Flags, OutOfStepError, StepTag


def test_ranks_at_one_step_pass_and_others_do_not() -> None:
    here = StepTag(7, merges=True)
    here.check(torch.full((4096,), float(here.checksum)).sum().item(), 4096)
    for other in (StepTag(8, True), StepTag(7, False), StepTag(6, True)):
        for ranks in (2, 3, 64):
            with pytest.raises(OutOfStepError, match="step 7, after which a merge follows"):
                here.check((ranks - 1) * here.checksum + other.checksum, ranks)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=64), st.booleans())
def test_flags_of_all_ranks_add_up_exactly(ranks: list[tuple[bool, bool]], save: bool) -> None:
    """In float32, in whatever order; and the greatest sum of 2895 ranks is still exact there."""
    assert 2895 * Flags(stops=1, faults=1, saves=0).number(2895) + 1 < 2**24
    numbers = [
        Flags(stops=stop, faults=fault, saves=save and rank == 0).number(len(ranks))
        for rank, (stop, fault) in enumerate(ranks)
    ]
    total = torch.tensor(numbers, dtype=torch.float32).sum()
    stops, faults = (sum(flags) for flags in zip(*ranks, strict=True))
    assert Flags.of_sum(float(total), len(ranks)) == Flags(stops=stops, faults=faults, saves=int(save))
