"""Exports, `generate` and `eval`: a plain Hugging Face process sees the model that was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loqt_scale.checkpoint import Checkpoint
from loqt_scale.cli import main
from loqt_scale.data.tokenizers import load_tokenizer
from loqt_scale.inference.saved_model import open_saved, saved_settings
from loqt_scale.layers import loqt_layers
from loqt_scale.strategies import single_process
from tests.distributed.pool import RankPool
from tests.distributed.tasks import SMALL_RUN, _word
from tests.unit.process.test_streams import closed, full_disk, nobody_reads

TEXT = "The import statement – naïve – binds <names>.\n"
IDS = torch.arange(5, 29).reshape(2, 12)

# What a user without this package runs on an exported folder.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

wanted, text, ids = json.loads(sys.argv[1]), sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
answers = {}
for folder, adapter in wanted:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model.load_adapter(folder + "/adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
    written = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    answers[folder] = {
        "logits": logits.tolist(),
        "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
        "text": tokenizer.decode(tokenizer(text)["input_ids"]),
        "end": tokenizer.eos_token_id,
        "config": [model.config.eos_token_id, model.config.use_cache, str(model.config.dtype)],
        "generation": model.generation_config.eos_token_id,
        "written": written.shape[1],
    }
assert not any(name.startswith("loqt_scale") for name in sys.modules)
json.dump(answers, open(sys.argv[4], "w"))
"""


def logits_of(run_dir: Path) -> torch.Tensor:
    """Of the latest checkpoint as it was trained: quantized, not merged."""
    checkpoint = Checkpoint(max((run_dir / "checkpoints").glob("step-*")))
    strategy = single_process(torch.device("cpu"))
    model = open_saved(checkpoint, saved_settings(checkpoint), strategy.comm).load(strategy)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def run_dirs(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path, ranks: RankPool
) -> dict[str, Path]:
    """Three trained runs; the one on two ranks has tied embeddings, a BPE, and rows that do not divide."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.steps": 8, "loqt.merge.gap": 3}
    # widths that bitsandbytes' own CPU kernel takes, for the 4-bit form
    even = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    tied = {**SMALL_RUN["model.overrides"], "tie_word_embeddings": True}
    words, short = text_file.read_text(encoding="utf-8").split()[:6000], folder / "short.txt"
    short.write_text("\n\n".join(" ".join(words[i : i + 6]) for i in range(0, len(words), 6)), encoding="utf-8")
    masked = {"data.mask_documents": True, "data.files": [str(short)]}
    runs: dict[str, dict[str, Any]] = {
        "single": {"model.overrides": even},
        "full": {"method": "full", "optim.lr": 1e-3, "train.steps": 5, "optim.warmup_steps": 1, **masked},
    }
    for name, settings in runs.items():
        merged = {**SMALL_RUN, **common, **settings, "train.run_dir": str(folder / name)}
        assert main(["train", *(f"--{key}={_word(value)}" for key, value in merged.items())]) == 0
    two = {"model.overrides": tied, "data.tokenizer": "bpe", "data.bpe_vocab_size": 400, "parallel.strategy": "fsdp"}
    ranks.run(2, "tests.distributed.tasks:train_run", **{**common, **two, "train.run_dir": str(folder / "two")})
    return {name: folder / name for name in (*runs, "two")}


@pytest.fixture(scope="module")
def exports(run_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    lines = {
        "single": ["--dtype", "float32", "--max_shard_size", "200KB"],
        "single-bf16": [],
        "single-nf4": ["--format", "nf4", "--dtype", "float32"],
        "two": ["--dtype", "float32"],
        "full": ["--dtype", "float32"],
    }
    for name, words in lines.items():
        source = run_dirs[name.partition("-")[0]]
        assert main(["export", "--checkpoint", str(source), "--out", str(folder / name), *words]) == 0
    return {name: folder / name for name in lines}


@pytest.fixture(scope="module")
def plain(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process that never imports this package makes of every export."""
    answers = tmp_path_factory.mktemp("plain") / "answers.json"
    wanted = json.dumps([[str(path), name.endswith("nf4")] for name, path in exports.items()])
    words = [sys.executable, "-W", "error::FutureWarning", "-c", PLAIN, wanted, TEXT, json.dumps(IDS.tolist())]
    done = subprocess.run([*words, str(answers)], capture_output=True, text=True, cwd=answers.parent, timeout=170)
    assert done.returncode == 0, done.stderr
    found = json.loads(answers.read_text())
    return {name: found[str(path)] for name, path in exports.items()}


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("single", 1e-5), ("two", 1e-5), ("full", 1e-5), ("single-bf16", 3e-2), ("single-nf4", 3e-2)],
)
def test_logits_are_the_trained_models(
    name: str, tolerance: float, run_dirs: dict[str, Path], plain: dict[str, Any]
) -> None:
    """The 4-bit form computes in bfloat16 on some CPUs (bitsandbytes' choice); its weights are compared below."""
    trained = logits_of(run_dirs[name.partition("-")[0]])
    exported = torch.tensor(plain[name]["logits"])
    assert trained.std() > 0.1
    assert (exported - trained).norm() < tolerance * trained.norm()


def test_weights_are_exact(run_dirs: dict[str, Path], exports: dict[str, Path]) -> None:
    """Saved by two ranks, exported by one process: bit for bit what the layer computes with."""
    checkpoint = Checkpoint(run_dirs["two"] / "checkpoints" / "step-00000008")
    strategy = single_process(torch.device("cpu"))
    model = open_saved(checkpoint, saved_settings(checkpoint), strategy.comm).load(strategy)
    written = load_file(exports["two"] / "model.safetensors")
    layers = dict(loqt_layers(model))
    assert len(layers) == 14 and {layer.side for layer in layers.values()} == {"input", "output"}
    for name, layer in layers.items():
        assert torch.equal(written.pop(f"{name}.weight"), layer.effective_weight()), name
        assert layer.factor.any()
    others = {name: p for name, p in model.named_parameters() if name in written}
    assert others.keys() == written.keys() and "lm_head.weight" not in written
    assert all(torch.equal(written[name], parameter) for name, parameter in others.items())


def test_the_four_bit_form_is_the_same_function(exports: dict[str, Path]) -> None:
    """dequant(base) + B A of the adapter is the merged weight; the base's bytes are those that were trained over."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    base, pairs = (
        load_file(exports["single-nf4"] / "model.safetensors"),
        load_file(exports["single-nf4"] / "adapter" / "adapter_model.safetensors"),
    )
    dense: dict[str, torch.Tensor] = {}
    for file in exports["single"].glob("model-*.safetensors"):
        dense |= load_file(file)
    layers = [name.removesuffix(".absmax") for name in base if name.endswith(".absmax")]
    assert len(layers) == 14 == len(pairs) / 2
    for name in layers:
        state = {key.removeprefix(f"{name}."): value for key, value in base.items() if key.startswith(f"{name}.")}
        weight = dequantize_4bit(base[name], QuantState.from_dict(state, torch.device("cpu")))
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        weight = weight + pairs[f"{layer}.lora_B.weight"] @ pairs[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(weight, dense[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("output", "status"), [(nobody_reads, 141), (closed, 2), (full_disk, 2)])
def test_an_export_needs_no_reader_what_is_printed_does(
    run_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], output: Any, status: int
) -> None:
    source = ["--checkpoint", str(run_dirs["full"])]
    for words in (["eval", *source], ["generate", *source, "--max_new_tokens=2"]):
        with output() as stream, redirect_stdout(stream):
            assert main(words) == status
        told = capsys.readouterr().err
        assert told.count("standard output c") == (status == 2) and "Traceback" not in told and "ranks" not in told
    with output() as stream, redirect_stdout(stream):
        assert main(["export", *source, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("standard output ") == 1 and (tmp_path / "out/model.safetensors").is_file()


def test_files_are_those_of_save_pretrained(exports: dict[str, Path], plain: dict[str, Any]) -> None:
    folder = exports["single"]
    files = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 250_000 for path in folder.glob("model-*"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(folder / f).values())
    assert set(index["weight_map"].values()) == set(files)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert plain["single"]["config"] == [256, True, "torch.float32"]
    assert plain["single-bf16"]["config"] == [256, True, "torch.bfloat16"]
    assert all(answer["generation"] == answer["end"] for answer in plain.values())
    assert all(answer["written"] > IDS.shape[1] for answer in plain.values())


def test_the_tokenizer_comes_along(run_dirs: dict[str, Path], plain: dict[str, Any]) -> None:
    assert plain["single"]["ids"] == list(TEXT.encode()) == load_tokenizer("bytes").encode_batch([TEXT])[0]
    assert len(plain["two"]["ids"]) < len(TEXT.encode())
    assert all(answer["text"] == TEXT for answer in plain.values())


@pytest.mark.parametrize("name", ["single", "two", "full"])
def test_eval_is_the_runs_own(
    name: str, run_dirs: dict[str, Path], exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the checkpoint to the last bit on the same ranks; of the export within rounding."""
    from loqt_scale.inference import evaluate_saved

    lines = (run_dirs[name] / "metrics.jsonl").read_text().splitlines()
    expected = [row["eval/loss"] for row in map(json.loads, lines) if "eval/loss" in row][-1]
    assert evaluate_saved(str(run_dirs[name])) == pytest.approx(expected, abs=1e-6 if name == "two" else 1e-12)
    assert main(["eval", "--checkpoint", str(exports[name]), "--train.micro_batch_size", "3"]) == 0
    printed = capsys.readouterr().out
    assert float(printed.rpartition("loss     ")[2].split()[0]) == pytest.approx(expected, abs=1e-5)
    if name == "full":  # trained and scored with masks; an evaluation may say otherwise
        assert main(["eval", "--checkpoint", str(exports[name]), "--data.mask_documents", "false"]) == 0
        printed = capsys.readouterr().out
        assert float(printed.rpartition("loss     ")[2].split()[0]) != pytest.approx(expected, abs=1e-5)


def test_eval_on_two_ranks(run_dirs: dict[str, Path], ranks: RankPool) -> None:
    lines = (run_dirs["single"] / "metrics.jsonl").read_text().splitlines()
    expected = [row["eval/loss"] for row in map(json.loads, lines) if "eval/loss" in row][-1]
    losses = ranks.run(2, "tests.distributed.tasks:evaluate_checkpoint", path=str(run_dirs["single"]))
    assert losses == pytest.approx([expected] * 2, abs=1e-6)


def test_generate(run_dirs: dict[str, Path], exports: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The likeliest tokens of a checkpoint and of its export are the same; a seed repeats a sample."""
    texts = []
    for source in (run_dirs["two"], exports["two"]):
        words = ["generate", "--checkpoint", str(source), "--prompt", "The import", "--max_new_tokens", "12"]
        assert main([*words, "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
        assert main([*words, "--seed", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
    assert all(text.startswith("The import") and len(text) > len("The import\n") for text in texts)
    assert main(["generate", "--checkpoint", str(exports["two"]), "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--checkpoint", "RUN", "--out", "RUN"], "exists; write a folder that does not"),
        (["export", "--checkpoint", "RUN", "--out", "OUT", "--max_shard_size", "big"], "write a size such as 500MB"),
        (["export", "--checkpoint", "NONE", "--out", "OUT"], "is no folder"),
        (["export", "--checkpoint", "EMPTY", "--out", "OUT"], "holds no checkpoint"),
        (["export", "--checkpoint", "EXPORT", "--out", "OUT"], "is a Hugging Face model already"),
        (
            ["export", "--checkpoint", "FULL", "--out", "OUT", "--format", "nf4"],
            "has no 4-bit base; write --format dense",
        ),
        (["export", "--checkpoint", "RUN", "--output", "OUT"], "did you mean '--out'?"),
        (["export", "--checkpoint", "RUN"], "no --out; write --checkpoint CHECKPOINT --out OUT"),
        (["export", "--checkpoint", "RUN", "--out", "OUT", "--dtype", "int8"], "write one of float32, bfloat16"),
        (["generate", "--checkpoint", "RUN", "--max_new_tokens", "many"], "is 'many'; write a whole number"),
        (["generate", "--max-new-tokens", "3"], "did you mean '--max_new_tokens'?"),
        (["generate", "--checkpoint", "RUN", "--temperature", "-1"], "write 0 (the likeliest token) or 0.0001 to"),
        (["generate", "--checkpoint", "RUN", "--max_new_tokens", "5000"], "positions; write a shorter prompt"),
        (["eval", "--checkpoint", "RUN", "--loqt.rank", "4"], "loqt.rank is the model's and stays 8"),
        (["eval", "--data.seq_len", "16"], "no --checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    run_dirs: dict[str, Path],
    exports: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "RUN": run_dirs["single"],
        "FULL": run_dirs["full"],
        "EXPORT": exports["single"],
        "OUT": tmp_path / "out",
        "NONE": tmp_path / "none",
        "EMPTY": tmp_path,
    }
    assert main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(
    run_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file is found first; a full disk halfway removes what was written."""
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(run_dirs["single"] / "checkpoints" / "step-00000008", damaged)
    (shard,) = damaged.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
    assert main(["export", "--checkpoint", str(damaged), "--out", str(tmp_path / "out")]) == 2
    assert "does not have its checksum" in capsys.readouterr().err

    import loqt_scale.export.model_folder as folder

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full_disk)
    assert main(["export", "--checkpoint", str(run_dirs["single"]), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot be exported to" in error and "No space left on device" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
