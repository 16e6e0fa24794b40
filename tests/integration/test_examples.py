"""The examples run, in their short form: each trains both methods and prints its table."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.integration.trainer_cases import tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, and the examples' on the path as `python examples/x.py` has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return tmp_path


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--short", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


BOTH = [
    *("own_loop", "text_classification", "vit", "diffusion_transformer", "reinforcement_learning"),
    "mixture_of_experts",
]


@pytest.mark.parametrize("name", BOTH)
def test_both_methods_train(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("vit", "diffusion_transformer"):
        pytest.importorskip("mlxtend")
    if name == "reinforcement_learning":
        pytest.importorskip("gymnasium")
    run(name, monkeypatch)
    table = capsys.readouterr().out.split("| |")[-1]
    rows = [line.split("|") for line in table.splitlines() if line.startswith(("| loqt", "| full"))]
    assert [row[1].split()[0].strip(",") for row in rows] == ["loqt", "full"] * (2 if name == "own_loop" else 1)
    assert all(float(row[-2]) > 0 for row in rows)  # bytes of the states
    assert len(list((here / "runs" / "examples").glob("*.png"))) == 1


def test_continued_pretraining_of_a_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from passages import make_tokenizer

    text = (EXAMPLES / "passages.py").read_text() * 8
    tokenizer = make_tokenizer([text])
    tokenizer.save_pretrained(here / "model")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(here / "model")
    (here / "text.txt").write_text(text)
    assert len(AutoTokenizer.from_pretrained(here / "model")) == len(tokenizer)
    run("continued_pretraining", monkeypatch, "--model", str(here / "model"), "--text", str(here / "text.txt"))
    printed = capsys.readouterr().out
    assert printed.count("before:") == printed.count("after:") == 3 and "| loqt" in printed
