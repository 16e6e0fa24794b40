"""Which line a warning names: the program's, through our frames, torch's decorators and module calls."""

from __future__ import annotations

import linecache
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loqt_scale
from loqt_scale import LoQTConfig, attach, convert_to_loqt
from loqt_scale.layers.layer import BLANK_PASSES
from loqt_scale.process.caller import warn_caller
from tests.unit.merge.small import SKETCH, Small, attached

PACKAGE = Path(loqt_scale.__file__).parent
TOKENS = torch.zeros(1, 4, dtype=torch.long)


def conversion() -> None:
    convert_to_loqt(Small(), LoQTConfig(rank=8, exclude_modules=("head",)))


def forward_without_merges() -> None:
    model = Small()
    convert_to_loqt(model, LoQTConfig(rank=8))
    for _ in range(BLANK_PASSES):
        model(TOKENS)


def attaching() -> None:
    model = Small()
    convert_to_loqt(model, SKETCH)
    attach(model, torch.optim.AdamW(model.parameters()), SKETCH)


def beginning() -> None:
    _, _, merges = attached()
    merges.prepare(7)


def merge() -> None:
    model, _, merges = attached()
    merges.prepare()
    (model(TOKENS).sum() * float("nan")).backward()
    merges.finish()


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (conversion, 'convert_to_loqt(Small(), LoQTConfig(rank=8, exclude_modules=("head",)))'),
        (forward_without_merges, "hidden = hidden + self.square(hidden)"),
        (attaching, "attach(model, torch.optim.AdamW(model.parameters()), SKETCH)"),
        (beginning, "merges.prepare(7)"),
        (merge, "merges.finish()"),
    ],
)
def test_a_warning_names_the_programs_line(program: Callable[[], None], line: str) -> None:
    with pytest.warns(UserWarning) as told:
        program()
    assert line in [linecache.getline(each.filename, each.lineno).strip() for each in told]
    assert not any(PACKAGE in Path(each.filename).parents for each in told)


def test_a_thread_that_no_program_began_is_named_as_it_is() -> None:
    with pytest.warns(UserWarning, match="said") as told:
        thread = threading.Thread(target=warn_caller, args=("said",))
        thread.start()
        thread.join()
    assert told[0].filename == threading.__file__
