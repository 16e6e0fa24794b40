"""Golden losses: a refactor, or a new feature that is off, changes no number of any run by a bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_runs_of_every_kind_give_the_recorded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """23 runs against tests/golden.json; `python benchmarks/golden.py --record tests/golden.json` makes it anew."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    import golden

    recorded = json.loads((TESTS / "golden.json").read_text(encoding="utf-8"))
    if recorded["machine"] != golden.fingerprint():
        pytest.skip(f"recorded on {recorded['machine']}: another processor or torch rounds otherwise")
    golden.warm_up()
    assert golden.compare(recorded, golden.record(list(golden.CASES))) == 0
