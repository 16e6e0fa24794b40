"""Models of strangers at the command line: one line and status 2, nothing written, nothing outside the folder read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loqt_scale.cli import main
from tests.distributed.tasks import SMALL_RUN, _word
from tests.unit.checkpoint.forging import SHARD, edit_tensors, forge


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> Path:
    """A checkpoint of two steps, with widths that bitsandbytes' CPU kernel takes."""
    folder = tmp_path_factory.mktemp("trained")
    even = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "model.overrides": even}
    merged = {**SMALL_RUN, **own, "train.steps": 2, "optim.warmup_steps": 1, "train.run_dir": str(folder)}
    assert main(["train", *(f"--{key}={_word(value)}" for key, value in merged.items())]) == 0
    return folder / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for form in ("dense", "nf4"):
        words = ["--checkpoint", str(trained), "--out", str(folder / form), "--format", form, "--dtype", "float32"]
        assert main(["export", *words]) == 0
    return {form: folder / form for form in ("dense", "nf4")}


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / source.name))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def commands(path: Path, out: Path) -> list[list[str]]:
    """Everything that can be done with a model."""
    export = ["export", "--checkpoint", str(path), "--out", str(out)]
    return [
        ["eval", "--checkpoint", str(path)],
        ["generate", "--checkpoint", str(path), "--max_new_tokens", "2"],
        export,
        [*export, "--format", "nf4"],
    ]


def assert_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and "Traceback" not in "".join(lines)
    assert sum("error:" in line for line in lines) == 1  # beside what transformers says while it loads


@pytest.mark.parametrize(
    "name", ["model.model.norm.weight", "model.model.layers.0.mlp.up_proj.factor", "...up_proj.base.scales"]
)
def test_numbers_that_are_none_are_named(
    trained: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense, 4-bit and adapter alike; and a run does not go on from them."""
    name = name.replace("...", "model.model.layers.0.mlp.")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.float32)[1] = float("nan")

    path = copied(trained, tmp_path)
    edit_tensors(path, spoil)
    for words in commands(path, tmp_path / "out"):
        assert_refused(words, f"{name} holds NaN or infinity", capsys)
    assert not list(tmp_path.glob("*out*"))


def test_a_run_does_not_go_on_from_them(
    trained: Path, tmp_path: Path, text_file: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = copied(trained, tmp_path), "moments.model.norm.weight.second"
    edit_tensors(path, lambda tensors: tensors[name].fill_(float("inf")))
    settings = ["--config", str(path / "config.yaml"), "--train.run_dir", str(tmp_path / "run"), "--train.steps", "2"]
    assert_refused(["train", *settings, "--checkpoint.resume", str(path)], f"{name} holds NaN or infinity", capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers cannot be made of"),
        ({"hidden_size": 10**9}, "is of another model"),
        ({"vocab_size": 10**13}, "is of another model"),
        ({"hidden_act": "evil"}, "makes no model"),
        ({"num_attention_heads": 0}, "makes no model"),
        ({"model_type": ["llama"]}, "makes no model"),
    ],
)
def test_a_config_that_asks_for_too_much(
    trained: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found on the meta device: before anything is allocated."""
    path = copied(trained, tmp_path)
    edit_json(path / "huggingface" / "config.json", **changes)
    forge(path)
    assert_refused(commands(path, tmp_path / "out")[0], message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1, 2]\nb: *a\n", "holds aliases, or brackets too deep"),
        ("[" * 10_000, "holds aliases, or brackets too deep"),
        ("\0", "is not YAML"),
        ("unknown: 1", "unknown key"),
    ],
)
def test_settings_that_unfold(
    trained: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(trained, tmp_path)
    (path / "config.yaml").write_text(text)
    forge(path)
    assert_refused(commands(path, tmp_path / "out")[0], message, capsys)


def test_an_export_copies_no_links_and_names_no_code(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    (tmp_path / "secret").write_text("a secret")
    (path / "huggingface" / "notes.json").symlink_to(tmp_path / "secret")
    save_file({"model.model.norm.weight": torch.full((128,), 5.0)}, path / "anything.safetensors")
    edit_json(path / "huggingface" / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    forge(path)
    assert main(["export", "--checkpoint", str(path), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert not (tmp_path / "out" / "notes.json").exists()
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "out").glob("*.json"))
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, load_file(trained / SHARD)["model.model.norm.weight"])


def edit_weights(path: Path, name: str) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FOLDERS: list[tuple[str, Callable[[Path], object], str]] = [
    ("dense", lambda f: edit_weights(f / "model.safetensors", "model.norm.weight"), "model.norm.weight holds NaN"),
    ("nf4", lambda f: edit_weights(f / "model.safetensors", _ABSMAX), "mlp.up_proj.weight holds NaN"),
    ("nf4", lambda f: edit_weights(f / "adapter" / "adapter_model.safetensors", _LORA), "up_proj.lora_A"),
    ("dense", index_elsewhere, "is no index of safetensors files beside it"),
    ("dense", lambda f: edit_json(f / "config.json", attn_implementation="evil/kernel"), "asks for code"),
    ("nf4", lambda f: edit_json(f / "adapter" / "adapter_config.json", auto_mapping={}), "none that loqt-scale wrote"),
    ("nf4", lambda f: edit_json(f / "adapter" / "adapter_config.json", peft_type="IA3"), "none that loqt-scale wrote"),
    ("dense", lambda f: (f / "loqt_scale.yaml").write_text("a: &a [1]\nb: *a\n"), "holds aliases"),
]
_ABSMAX = "model.layers.0.mlp.up_proj.weight.absmax"
_LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(("form", "edit", "message"), FOLDERS)
def test_exports_that_were_tampered_with(
    exported: dict[str, Path],
    tmp_path: Path,
    form: str,
    edit: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(exported[form], tmp_path)
    edit(path)
    assert_refused(commands(path, tmp_path / "out")[0], message, capsys)
