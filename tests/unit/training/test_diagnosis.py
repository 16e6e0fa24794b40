"""What is told of a run that goes wrong: real merges that are spoilt on purpose, and no word about sound ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.nn.functional import cross_entropy

from loqt_scale.config import LoQTConfig, MergeConfig, OptimConfig, QuantizationConfig, RunConfig
from loqt_scale.merge import MergeReport
from loqt_scale.training.diagnosis import (
    WINDOW,
    Diagnosis,
    chance_overlaps,
    loss_rises,
    subspace_is_frozen,
    update_is_lost,
)
from tests.unit.merge.small import RANK, Small, batch, config, make


def merged(settings: LoQTConfig, *, lr: float, same_batch: bool = False, steps: int = 21) -> list[MergeReport]:
    """The reports of a real run of the tests' small model."""
    model, merges, optimizer = make(settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    reports = []
    for step in range(steps):
        merges.prepare(step)
        inputs, targets = batch(0 if same_batch else step)
        cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        reports.append(merges.finish(step))
        optimizer.zero_grad()
    return [report for report in reports if report is not None]


CHANCE = {"square": RANK / 48, "up": RANK / 48, "down": RANK / 48}


def test_chance_is_the_overlap_of_unrelated_subspaces() -> None:
    model, _, _ = make(config())
    assert chance_overlaps(model) == pytest.approx(CHANCE)
    assert chance_overlaps(Small()) == {}  # full-rank training


def test_an_update_is_lost_without_compensation_and_survives_with_it() -> None:
    spoilt = merged(config(compensation_rounds=0), lr=1e-5)
    assert not update_is_lost(spoilt[0])  # the first merge has folded nothing yet
    assert all(update_is_lost(report) for report in spoilt[1:])
    assert not any(update_is_lost(report) for report in merged(config(), lr=1e-2))
    unquantized = replace(config(compensation_rounds=0), quantization=QuantizationConfig(weight="none"))
    assert not any(update_is_lost(report) for report in merged(unquantized, lr=1e-5))


def test_a_subspace_freezes_where_nothing_changes_the_gradient() -> None:
    frozen = merged(config(), lr=1e-7, same_batch=True)
    assert [subspace_is_frozen(frozen[:count], CHANCE) for count in range(6)] == [False] * 4 + [True] * 2
    moving = merged(config(), lr=1e-2)
    assert not subspace_is_frozen(moving, CHANCE)
    whole = {name: 1.0 for name in CHANCE}  # P spans the whole side: it cannot be another
    assert not subspace_is_frozen(frozen, whole)


def test_the_loss_rises_above_the_best_of_before() -> None:
    assert not loss_rises([]) and not loss_rises([5.0])
    assert not loss_rises([3.0, 3.15])
    assert loss_rises([3.0, 3.3]) and loss_rises([9.0, 3.0, 3.3])
    assert loss_rises([49.0], 5.8) and loss_rises([49.0, 20.0], 5.8) and not loss_rises([49.0, 6.5], 5.8)


RUN = RunConfig(optim=OptimConfig(lr=0.02, full_precision_lr=0.01))


def told(config_: RunConfig, losses: list[float], reports: list[MergeReport]) -> list[str]:
    """Lines of a run of so many windows between merges."""
    lines: list[str] = []
    diagnosis = Diagnosis(config_.loqt, config_.optim, CHANCE, lines.append)
    for loss, report in zip(losses, reports, strict=True):
        for _ in range(WINDOW):
            diagnosis.take_loss(loss)
        diagnosis.take_merge(report)
    return lines


def test_it_says_once_what_to_change_and_when_it_is_over() -> None:
    sound, spoilt = merged(config(), lr=1e-2)[1:], merged(config(compensation_rounds=0), lr=1e-5)[1:]
    assert told(RUN, [4.0, 3.5, 3.2, 3.1], sound) == []
    lost = told(RUN, [3.0] * 5, [*spoilt[:4], sound[0]])
    assert len(lost) == 4 and lost[-1] == "updates survive merges again"
    assert lost[1].endswith("(2 times by now)") and lost[2].endswith("(4 times by now)")
    assert "raise" not in lost[0] and "loqt.quantization.weight: int8" in lost[0]
    assert lost[0].startswith("WARNING: the merge kept") and "loqt.rank than 128" in lost[0]
    without = replace(RUN, loqt=LoQTConfig(merge=MergeConfig(compensation_rounds=0)))
    assert told(without, [3.0], spoilt[:1])[0].endswith("write loqt.merge.compensation_rounds: 5")
    rising = told(RUN, [4.0, 3.0, 3.5, 2.9], sound)
    assert rising[0].startswith("WARNING: the mean loss since the last merge is 3.500 and was 3.000 before")
    assert "lower optim.lr 0.02 or optim.full_precision_lr 0.01" in rising[0]
    assert rising[1:] == ["the loss has come down again"]
    blown_up: list[str] = []  # from the first steps on: every mean is lower than the one before
    diagnosis = Diagnosis(RUN.loqt, RUN.optim, CHANCE, blown_up.append)
    for loss in (5.8, *[49.0] * WINDOW):
        diagnosis.take_loss(loss)
    diagnosis.take_merge(sound[0])
    assert "is 46.943 and was 5.800 before" in blown_up[0]
    frozen = told(RUN, [3.0] * 4, merged(config(), lr=1e-7, same_batch=True)[1:])
    assert len([line for line in frozen if "loqt.merge.gap: 200 instead of 100" in line]) >= 1
    assert "raise optim.lr 0.02" in frozen[-1] and "loqt.rank than 128" in frozen[-1]


def test_a_source_that_has_been_read_often_is_told_of_once() -> None:
    said: list[str] = []
    diagnosis = Diagnosis(LoQTConfig(), OptimConfig(), {}, said.append)
    for epochs in (3.9, 4.5, 6.0):
        diagnosis.take_epochs({"web": epochs, "code": 0.5})
    assert len(said) == 1 and "'web' has been read 4.5 times" in said[0]
