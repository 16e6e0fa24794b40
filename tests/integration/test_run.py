"""Whole runs through the command a user types, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.cli import main
from loqt_scale.config.yaml import load_run_config
from loqt_scale.data.tokenizers import train_bpe
from tests.distributed.tasks import SMALL_RUN, _word

ROOT = Path(__file__).resolve().parent.parent.parent


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={_word(value)}" for key, value in {**SMALL_RUN, **settings}.items()]


@pytest.fixture
def base(text_file: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data.files": [str(text_file)],
        "data.cache_dir": str(cache_dir),
        "train.run_dir": str(tmp_path / "run"),
        "train.steps": 8,
        "loqt.merge.gap": 3,
    }


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_script_trains_merges_and_says_where_everything_is(base: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *words(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merge ") >= 2
    assert "held-out perplexity" in done.stdout and "tensorboard --logdir" in done.stdout
    assert "Traceback" not in done.stderr
    run_dir = Path(base["train.run_dir"])
    rows = rows_of(run_dir)
    wanted = {"train/loss", "train/grad_norm", "train/lr_low_rank", "perf/tokens_per_second", "perf/step_seconds"}
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert all(wanted <= row.keys() and any(key.startswith("memory/") for key in row) for row in training)
    merges = [row for row in rows if "merge/seconds" in row]
    assert [row["step"] for row in merges] == [1, 5]
    assert {"merge/error_before", "merge/error_after", "merge/gradient_energy"} <= merges[0].keys()
    assert {"merge/subspace_overlap", "merge/energy_overlap", "merge/update_survival"} <= merges[1].keys()
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [0, 8]
    assert load_run_config(run_dir / "config.yaml").train.steps == 8
    assert list((run_dir / "tensorboard").iterdir())


def test_same_seed_same_numbers_another_seed_others(base: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_dir = tmp_path / name
        assert main(["train", *words({**base, "train.run_dir": str(run_dir), "train.seed": seed})]) == 0
        losses.append([row["train/loss"] for row in rows_of(run_dir) if "train/loss" in row])
    assert losses[0] == losses[1] != losses[2]


def test_n_steps_are_n_updates_and_logging_less_changes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    assert main(["train", *words({**base, "train.run_dir": str(tmp_path / "all")})]) == 0
    sparse = {**base, "train.run_dir": str(tmp_path / "few"), "train.log_every": 4, "train.eval_every": 2}
    assert main(["train", *words(sparse)]) == 0
    dense, few = rows_of(tmp_path / "all"), rows_of(tmp_path / "few")
    assert [row["step"] for row in few if "eval/loss" in row] == [0, 2, 4, 6, 8]
    last = [[row for row in rows if "eval/loss" in row][-1]["eval/loss"] for rows in (dense, few)]
    assert last[0] == last[1], "evaluating in the middle must change nothing"
    assert dense[-1]["step"] == 8 and max(row.get("train/tokens", 0) for row in dense) == 8 * 8 * 32


def test_wire_counter_on_one_rank_counts_nothing(base: dict[str, Any]) -> None:
    assert main(["train", *words({**base, "train.wire_counter": "once"})]) == 0
    rows = rows_of(Path(base["train.run_dir"]))
    assert [row["wire/step_payload_bytes"] for row in rows if "wire/step_payload_bytes" in row] == [0]


def test_a_loss_that_explodes_stops_the_run_before_the_update(
    base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**base, "train.steps": 30, "optim.lr": 1e30, "optim.full_precision_lr": 1e30, "optim.warmup_steps": 0}
    assert main(["train", *words(settings)]) == 2
    error = capsys.readouterr().err
    assert "loss " in error and "the update was not applied" in error and "Last good values: step" in error
    assert "Lower optim.lr" in error and "Traceback" not in error
    steps = [row["step"] for row in rows_of(Path(base["train.run_dir"])) if "train/loss" in row]
    assert steps and f"step {steps[-1] + 1}:" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.files": ["nowhere.txt"]}, "nowhere.txt"),
        ({"loqt.rank": 97}, "write 96 or less"),
        ({"loqt.quantization.block_size": 48}, "write one of 32, 64"),
        ({"loqt.target_modules": ["*.nothing"]}, "matches no linear layer"),
        ({"parallel.strategy": "fsdp"}, "torchrun --standalone"),
        ({"parallel.strategy": "ddp"}, "torchrun --standalone"),
        ({"train.device": "cuda"}, "torch sees no CUDA device"),
        ({"parallel.strategy": "fsdp", "parallel.offload": "all"}, "strategy: zero and its zero_offload"),
        ({"parallel.offload": "all", "optim.per_layer": True, "optim.clip_norm": 0}, "write parallel.offload: base"),
        ({"parallel.offload": "base", "method": "full"}, "write parallel.offload: optimizer"),
        ({"model.preset": "llama_60b"}, "llama_60m"),
        ({"model.overrides": {"num_key_value_heads": 3}}, "no model can be built from model.preset llama_nano"),
        ({"model.overrides": {"hidden_act": "evil"}}, "KeyError: 'evil'"),
        ({"model.overrides": {"pad_token_id": 99999}}, "Padding_idx must be within num_embeddings"),
        ({"model.overrides": {"attention_dropout": 5.0}}, "dropout probability has to be between 0 and 1"),
        ({"loqt.scale": 1e308}, "write a number that float32 can hold"),
        (
            {"optim.per_layer": True, "optim.clip_norm": 0, "train.micro_batch_size": 2},
            "write train.micro_batch_size: ",
        ),
    ],
)
def test_what_cannot_work_says_what_to_write(
    base: dict[str, Any], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And before the run folder is touched: an older run in it must not be moved aside for nothing."""
    run_dir = Path(base["train.run_dir"])
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["train", *words({**base, **change})]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_an_empty_corpus_is_refused(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert main(["train", *words({**base, "data.files": [str(empty)]})]) == 2
    assert "empty.txt" in capsys.readouterr().err


def test_single_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from loqt_scale.config import ParallelConfig
    from loqt_scale.strategies import resolve_strategy

    launched = {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match=r"the launcher started 2 ranks; write parallel\.strategy: fsdp"):
        resolve_strategy(ParallelConfig(strategy="single"), launched)
    assert resolve_strategy(ParallelConfig(), launched) == "fsdp"
    assert resolve_strategy(ParallelConfig(), {}) == "single"


@pytest.mark.long  # compiling takes most of a minute; the layer by itself is compiled in tests/unit
def test_compiled_blocks_train_to_the_same_losses(base: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for name, compiled in (("plain", False), ("compiled", True)):
        run_dir = tmp_path / name
        settings = {**base, "train.run_dir": str(run_dir), "model.compile": compiled, "train.steps": 5}
        assert main(["train", *words(settings)]) == 0
        losses.append([row["train/loss"] for row in rows_of(run_dir) if "train/loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_a_pretrained_folder_goes_on_training(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real `save_pretrained` files; the first merge reads the true weights from them once more."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=2, tie_word_embeddings=True, **shape))
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)  # something that no initialisation gives
    model.save_pretrained(tmp_path / "model")
    pretrained = {"model.path": str(tmp_path / "model"), "model.weights": "pretrained", "model.overrides": {}}
    assert main(["train", *words({**base, **pretrained, "loqt.quantization.weight": "none"})]) == 0
    assert "(pretrained weights); LoQT" in capsys.readouterr().out
    rows = rows_of(Path(base["train.run_dir"]))
    from loqt_scale.data import build_corpus

    corpus = build_corpus(
        load_run_config(Path(base["train.run_dir"]) / "config.yaml").data, seed=0, global_batch_size=8
    )
    with torch.no_grad():
        logits = model(input_ids=corpus.eval.input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), corpus.eval.labels.flatten(), ignore_index=-100)
    assert rows[0]["eval/loss"] == pytest.approx(float(expected), abs=1e-4)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    train_bpe(["the cat sat on the mat"] * 50, 300, tmp_path / "model")  # the folder's own tokenizer now
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["train", *words({**base, **pretrained, "train.run_dir": str(tmp_path / "other")})]) == 2
    assert "write data.tokenizer: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_readmes_library_loop_trains() -> None:
    """The README's ten lines, taken from the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.partition("<!-- library -->")[2].partition("```python")[2].partition("```")[0]
    assert "convert_to_loqt" in code
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["losses"][-1] < 0.5 * namespace["losses"][0]
