"""Folders of checkpoints: what counts, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loqt_scale.checkpoint.files import CheckpointError, ListedFiles, file_digest
from loqt_scale.checkpoint.folder import CONFIG, CheckpointFolder
from loqt_scale.checkpoint.manifest import Manifest, read_manifest


def write(folder: CheckpointFolder, step: int, *, publish: bool = True) -> Path:
    partial = folder.begin(step)
    for name in (CONFIG, "shard-00001-model-00001-of-00001.safetensors"):
        (partial / name).write_text(f"{name} {step}")
    files = {path.name: file_digest(path) for path in partial.iterdir()}
    position = {"step": step, "updates": step, "skipped_in_a_row": 0, "merge_is_due": False, "tokens": 7}
    who = {"world_size": 1, "strategy": "single", "eval_before": 2.5, "tensors": {}, "files": files}
    manifest = Manifest(format=1, **position, **who)
    return folder.publish(step, manifest) if publish else partial


def test_a_published_checkpoint_is_the_latest_and_reads_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.latest() is None and folder.steps() == []
    path = write(folder, 300)
    assert folder.latest() == path == tmp_path / "checkpoints" / "step-00000300"
    manifest = read_manifest(path)
    assert (manifest.step, manifest.tokens, manifest.eval_before) == (300, 7, 2.5)
    assert ListedFiles(path, manifest.files).damaged() == []


def test_a_half_written_one_never_counts_and_is_swept_away(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    done = write(folder, 10)
    left = write(folder, 20, publish=False)
    assert folder.latest() == done and folder.steps() == [10]
    write(folder, 30)
    assert not left.exists() and folder.steps() == [10, 30]


def test_killed_between_publishing_and_pointing(tmp_path: Path) -> None:
    """`latest` still names the older one, which is whole; the next save goes over what is there."""
    folder = CheckpointFolder(tmp_path)
    old = write(folder, 10)
    new = write(folder, 20)
    (tmp_path / "latest").write_text("step-00000010\n")
    assert folder.latest() == old
    (new / "junk").write_text("from before")
    assert write(folder, 20) == new == folder.latest() and not (new / "junk").exists()


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 30, 40, 50):
        write(folder, step)
    folder.prune(keep_last=2, keep_every=20)
    assert folder.steps() == [20, 40, 50]
    folder.prune(keep_last=1, keep_every=0)
    assert folder.steps() == [50]


@pytest.mark.parametrize("text", ["step-00000099", "../elsewhere", "", "\x00\xff"])
def test_a_pointer_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 10)
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"which is no checkpoint beside it; write --checkpoint.resume PATH"):
        folder.latest()


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path: Path) -> None:
    path = write(CheckpointFolder(tmp_path), 10)
    manifest = read_manifest(path)
    for name in manifest.files:
        whole = (path / name).read_bytes()
        for index in range(len(whole)):
            (path / name).write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            assert ListedFiles(path, manifest.files).damaged() == [f"{name} does not have its checksum"]
        (path / name).unlink()
        assert ListedFiles(path, manifest.files).damaged() == [f"{name} is missing"]
        (path / name).write_bytes(whole)
    assert ListedFiles(path, manifest.files).damaged() == []
    assert ListedFiles(path, manifest.files).damaged(["other"]) == ["other is missing"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "holds no format version"),
        ("{}", "holds no format version"),
        ('{"format": 2}', "has checkpoint format 2, but this version reads 1"),
        ('{"format": 1, "step": 3}', "is damaged"),
        ("\udcff", "is damaged"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(CheckpointFolder(tmp_path), 10)
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message):
        read_manifest(path)


@pytest.mark.parametrize("change", [{"color": "red"}, {"updates": 11}, {"sha256": "0" * 64}])
def test_a_changed_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = write(CheckpointFolder(tmp_path), 10)
    tree = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(tree | change))
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        read_manifest(path)
