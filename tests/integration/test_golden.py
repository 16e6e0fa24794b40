"""Golden losses: a refactor, or a new feature that is off, changes no number of any run by a bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_runs_of_every_kind_give_the_recorded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs against tests/golden.json; `python benchmarks/golden.py --also tests/golden.json` adds a machine."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    import golden

    recorded = json.loads((TESTS / "golden.json").read_text(encoding="utf-8"))
    here = [each for each in golden.recordings(recorded) if each["machine"] == golden.fingerprint()]
    if not here:
        pytest.skip(f"recorded on {recorded['machine']} and others: another processor or torch rounds otherwise")
    golden.warm_up()
    assert golden.compare(recorded, golden.record([name for name in golden.CASES if name in here[0]["runs"]])) == 0
