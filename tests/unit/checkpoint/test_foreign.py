"""Checkpoints as a stranger may have made them: whatever was forged, they load as saved or end in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from loqt_scale.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    locate_checkpoint,
    open_checkpoint,
    read_tensors,
)
from loqt_scale.checkpoint.folder import CheckpointFolder
from loqt_scale.checkpoint.manifest import Manifest
from loqt_scale.checkpoint.state import read_state
from loqt_scale.checkpoint.write import save_checkpoint
from loqt_scale.config import LoQTConfig, QuantizationConfig, RunConfig
from loqt_scale.config.yaml import save_run_config
from loqt_scale.functional.schemes import SCHEMES
from loqt_scale.layers import LoQTLinear
from loqt_scale.strategies import Channel, single_process
from tests.unit.checkpoint.forging import SHARD, edit_tensors, forge

DATA = '{"epoch": 0, "texts": 1, "tokens": 2, "rest": [3], "windows": 0}'
ONE = single_process(torch.device("cpu")).editing


def make_model(scheme: str = "nf4") -> nn.Module:
    """An embedding and a LoQT layer, with numbers of the seed."""
    torch.manual_seed(3)
    quantization = QuantizationConfig(weight=scheme, projection=scheme)  # type: ignore[arg-type]
    layer = LoQTLinear(32, 24, bias=True, config=LoQTConfig(rank=8, quantization=quantization))
    layer.base.store(torch.randn(24, 32))
    layer.projection.store(torch.randn(layer.spec.projection.rows, 8))
    return nn.ModuleDict({"embedding": nn.Embedding(10, 32), "layer": layer})


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return optimizer


def write_side_files(folder: Path) -> None:
    save_run_config(RunConfig(), folder / "config.yaml")
    (folder / "data.json").write_text(DATA)
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text("{}")


def save(root: Path, scheme: str = "nf4") -> Path:
    model = make_model(scheme)
    position = {"step": 5, "updates": 4, "skipped_in_a_row": 1, "merge_is_due": False, "tokens": 70}
    who = {"world_size": 1, "strategy": "single", "eval_before": 2.5, "tensors": {}}
    shares = read_state(model, make_optimizer(model), ONE)
    save_checkpoint(CheckpointFolder(root), Manifest(format=1, **position, **who), write_side_files, shares, Channel())
    return root / "step-00000005"


def load(path: Path) -> dict[str, Tensor]:
    """All numbers of a checkpoint, by way of a model of other numbers."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    load_checkpoint(open_checkpoint(path, ONE.comm), model, optimizer, ONE)
    return read_state(model, optimizer, ONE)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def numbers(original: Path) -> dict[str, Tensor]:
    return load(original)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "step-00000005"))


def assert_loads_equal_or_refuses(path: Path, numbers: dict[str, Tensor]) -> None:
    try:
        loaded = load(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert loaded.keys() == numbers.keys()
        assert all(torch.equal(loaded[name], numbers[name]) for name in numbers)


def test_what_is_saved_is_what_is_loaded(original: Path, numbers: dict[str, Tensor]) -> None:
    model = make_model()
    shares = read_state(model, make_optimizer(model), ONE)
    assert all(torch.equal(shares[name], numbers[name]) for name in shares) and shares.keys() == numbers.keys()
    whole = read_tensors(open_checkpoint(original, ONE.comm), ["model.layer.factor"], model)
    assert torch.equal(whole["model.layer.factor"], numbers["model.layer.factor"])


# ---- forged by chance ----------------------------------------------------------------------------------------------

WORDS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.integers(0, 99))
JSON = st.recursive(WORDS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=9), part))


def mutate(tree: Any, data: st.DataObject) -> None:
    """Replaces, removes or adds one value, anywhere in a tree."""
    while True:
        keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = data.draw(st.sampled_from([*keys, "new"]) if keys else st.just("new"))
        deeper = key in keys and isinstance(tree[key], dict | list) and data.draw(st.booleans())
        if not deeper:
            break
        tree = tree[key]
    if key == "new" and isinstance(tree, list):
        tree.append(data.draw(JSON))
    elif key == "new":
        tree[data.draw(st.text(max_size=9))] = data.draw(JSON)
    elif data.draw(st.integers(0, 4)) == 0:
        del tree[key]
    else:
        tree[key] = data.draw(JSON)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_forged_manifests(original: Path, scratch: Path, numbers: dict[str, Tensor], data: st.DataObject) -> None:
    path = Path(shutil.copytree(original, scratch / "manifest", dirs_exist_ok=True))
    try:
        forge(path, lambda tree: mutate(tree, data))
    except UnicodeEncodeError:  # half of a pair: no text that could be written
        return
    assert_loads_equal_or_refuses(path, numbers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_forged_headers(original: Path, scratch: Path, numbers: dict[str, Tensor], data: st.DataObject) -> None:
    path = Path(shutil.copytree(original, scratch / "header", dirs_exist_ok=True))
    content = (path / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    mutate(header, data)
    meta = header.get("__metadata__")
    if isinstance(meta, dict) and "DCP_SHARDING_INFO" in meta:
        meta["DCP_SHARDING_INFO"] = json.dumps(meta["DCP_SHARDING_INFO"])
    text = json.dumps(header).encode("utf-8", "replace")
    (path / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    forge(path)
    assert_loads_equal_or_refuses(path, numbers)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.binary(max_size=40), st.sampled_from([SHARD, "manifest.json", "config.yaml", "data.json"]))
@example(b"[" * 100_000, "manifest.json")
@example(b"[" * 100_000, "data.json")
@example(b"[" * 100_000, "config.yaml")
@example(struct.pack("<Q", 2**60) + b"{}", SHARD)
def test_garbage_with_the_right_checksum(original: Path, scratch: Path, content: bytes, name: str) -> None:
    path = Path(shutil.copytree(original, scratch / "garbage", dirs_exist_ok=True))
    (path / name).write_bytes(content)
    if name != "manifest.json":
        forge(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(path, ONE.comm)
        checkpoint.settings()
        if content and checkpoint.position() is not None:  # a JSON value, which the data set checks
            raise CheckpointError("a value")
        raise CheckpointError("YAML by chance" if name == "config.yaml" else "an empty position")
    assert "\n" not in str(caught.value)


# ---- forged on purpose ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.update(step="3"), "'step': Input should be a valid integer, got '3'"),
        (lambda tree: tree.update(step=-1), "'step': Input should be greater than or equal to 0"),
        (lambda tree: tree.update(step=True), "'step': Input should be a valid integer, got True"),
        (lambda tree: tree.update(updates=5), "5 updates and 1 skipped in a row of 5 steps"),
        (lambda tree: tree.update(files=None), "'files': Input should be a valid dictionary"),
        (lambda tree: tree.update(tensors=None), "'tensors': Input should be a valid dictionary"),
        (lambda tree: tree.update(color="red"), "'color': Extra inputs are not permitted"),
        (lambda tree: tree.pop("tokens"), "'tokens': Field required"),
        (
            lambda tree: tree["tensors"].update({"model.layer.bias": [[10**7, 10**7], "float32"]}),
            "of which its manifest says",
        ),
        (lambda tree: tree["tensors"].update({"model.layer.bias": [[-1], "float32"]}), "greater than or equal to 0"),
        (lambda tree: tree["tensors"].update({"model.layer.bias": [[24], "save"]}), "Input should be 'float32'"),
        (lambda tree: tree["tensors"].update({"model.layer.bias": [[], "float32"]}), "at least 1 item"),
        (lambda tree: tree["tensors"].pop("model.layer.bias"), "of which its manifest says nothing"),
        (lambda tree: tree["files"].update({"../secret": "0" * 64}), "String should match pattern"),
        (lambda tree: tree["files"].update({"/etc/passwd": "0" * 64}), "String should match pattern"),
        (lambda tree: tree["files"].update({"huggingface/../../x": "0" * 64}), "String should match pattern"),
        (lambda tree: tree["files"].update({"huggingface/.hidden": "0" * 64}), "String should match pattern"),
        (lambda tree: tree["files"].update({"huggingface/modeling.py": "0" * 64}), "is code or weights"),
        (lambda tree: tree["files"].update({"huggingface/model.safetensors": "0" * 64}), "is code or weights"),
        (lambda tree: tree["files"].update({"pickle.bin": "0" * 64}), "is code or weights"),
        (lambda tree: tree["files"].update({"config.yaml": "0" * 63}), "String should match pattern"),
        (lambda tree: tree["sizes"].update({SHARD: 7}), f"{SHARD} has .* bytes, not 7"),
    ],
)
def test_a_forged_manifest_is_told(copy: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    forge(copy, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layer.bias"), "do not hold each row of model.layer.bias once"),
        (lambda t: t.update({"model.layer.bias": torch.zeros(23)}), "do not hold each row of model.layer.bias once"),
        (lambda t: t.update({"model.layer.bias": torch.zeros(25)}), "do not hold each row of model.layer.bias once"),
        (lambda t: t.update({"model.layer.bias": torch.zeros(24, dtype=torch.float64)}), "holds .24,. None as"),
        (lambda t: t.update({"model.layer.bias": torch.zeros(24, 1)}), "holds .24, 1. float32 as .model.layer.bias"),
        (lambda t: t.update({"model.other": torch.zeros(1)}), "of which its manifest says nothing"),
    ],
)
def test_a_shard_that_holds_other_tensors(
    copy: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_manifest_without_end_is_not_read(copy: Path) -> None:
    os.truncate(copy / "manifest.json", 2**40)  # sparse: it takes no room on the disk
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        load(copy)


def test_checkpoints_without_sizes_still_load(copy: Path, numbers: dict[str, Tensor]) -> None:
    """As the first versions of format 1 wrote them."""
    forge(copy, lambda tree: tree.pop("sizes"))
    assert torch.equal(load(copy)["model.layer.factor"], numbers["model.layer.factor"])


# ---- files ---------------------------------------------------------------------------------------------------------


def link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", [SHARD, "config.yaml", "huggingface", "manifest.json"])
def test_links_inside_are_never_followed(copy: Path, tmp_path: Path, name: str) -> None:
    link(copy / name, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is or lies behind a link|symbolic link"):
        load(copy)


def test_the_folder_itself_may_be_a_link(copy: Path, tmp_path: Path, numbers: dict[str, Tensor]) -> None:
    link(copy, tmp_path / "elsewhere")
    assert torch.equal(load(copy)["model.layer.factor"], numbers["model.layer.factor"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None], ids=["pipe", "folder", "nothing"])
@pytest.mark.parametrize("name", [SHARD, "config.yaml", "manifest.json"])
def test_what_is_no_regular_file_is_refused_at_once(copy: Path, make: Callable[[Path], None], name: str) -> None:
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(CheckpointError, match=f"{name}.*(no regular file|is missing|directory)|it has no {name}"):
        load(copy)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("x")], ids=["pipe", "dir", "link"])
def test_latest_is_a_regular_file(copy: Path, make: Callable[[Path], None]) -> None:
    make(copy.parent / "latest")
    with pytest.raises(CheckpointError, match="latest cannot be read"):
        locate_checkpoint(copy.parent)


def test_unlisted_files_are_told_and_never_read(
    copy: Path, numbers: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"model.layer.bias": torch.full((24,), 5.0)}, copy / "anything.safetensors")
    (tmp_path / "secret").write_text("a secret")
    (copy / "huggingface" / "notes.json").symlink_to(tmp_path / "secret")
    (copy / "huggingface" / ".DS_Store").write_text("")
    assert torch.equal(load(copy)["model.layer.bias"], numbers["model.layer.bias"])
    told = capsys.readouterr().err
    assert "ignored: 'anything.safetensors', 'huggingface/notes.json'\n" in told
    checkpoint = Checkpoint(copy)
    assert [path.name for path in (checkpoint.side_files / "huggingface").iterdir()] == ["config.json"]


def keep_times(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("way", ["written over", "replaced", "linked"])
def test_what_is_verified_is_what_is_loaded(copy: Path, tmp_path: Path, way: str) -> None:
    """Between the two, somebody puts other numbers there, of the same size and with the old times."""
    checkpoint, shard = open_checkpoint(copy, ONE.comm), copy / SHARD
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    other = tmp_path / "other"
    other.write_bytes(content)
    if way == "written over":
        keep_times(shard, lambda: shard.write_bytes(content))
    elif way == "replaced":
        keep_times(shard, lambda: other.rename(shard))
    else:
        shard.unlink()
        shard.symlink_to(other)
    model = make_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"has changed while it was read|behind a link"):
        load_checkpoint(checkpoint, model, None, ONE)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_documents_are_read_once(copy: Path) -> None:
    """What libraries read is a copy of verified bytes: later edits of the folder change nothing."""
    checkpoint = Checkpoint(copy)
    copies = checkpoint.side_files
    (copy / "huggingface" / "config.json").write_text('{"evil": true}')
    assert (copies / "huggingface" / "config.json").read_text() == "{}"
    assert checkpoint.settings() == RunConfig()
    del checkpoint
    assert not copies.exists()


# ---- numbers -------------------------------------------------------------------------------------------------------


def spoil(tensors: dict[str, Tensor], name: str, value: float) -> None:
    tensor = tensors[name]
    numbers = tensor[:, :4].clone().view(torch.float32) if tensor.dtype == torch.uint8 else tensor
    numbers.view(-1)[0] = value
    if tensor.dtype == torch.uint8:
        tensor[:, :4] = numbers.view(torch.uint8)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", ["model.layer.factor", "model.embedding.weight", "moments.layer.bias.second"])
def test_a_number_that_is_none_is_named(copy: Path, part: str, value: float) -> None:
    edit_tensors(copy, lambda tensors: spoil(tensors, part, value))
    with pytest.raises(CheckpointError, match=f"{part} holds NaN or infinity"):
        load(copy)


@pytest.mark.parametrize("matrix", ["base", "projection"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_packed_number_that_is_none_is_named(tmp_path: Path, scheme: str, matrix: str) -> None:
    path, model = save(tmp_path, scheme), make_model(scheme)
    name = f"model.layer.{matrix}.{'codes' if scheme == 'none' else 'scales'}"
    load_checkpoint(open_checkpoint(path, ONE.comm), model, None, ONE)
    edit_tensors(path, lambda tensors: spoil(tensors, name, float("inf")))
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_checkpoint(open_checkpoint(path, ONE.comm), model, None, ONE)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        read_tensors(open_checkpoint(path, ONE.comm), [name], model)
