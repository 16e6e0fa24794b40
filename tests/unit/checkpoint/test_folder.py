"""Folders of checkpoints: what counts, what is kept, what is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.checkpoint.files import CheckpointError, ListedFiles, file_digest
from loqt_scale.checkpoint.folder import CONFIG, CheckpointFolder, locate_checkpoint
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
    assert folder.line() == [10] and folder.steps() == [10, 20]
    (new / "junk").write_text("from before")
    assert write(folder, 20) == new == folder.latest() and not (new / "junk").exists()
    assert (tmp_path / "abandoned-1" / "step-00000020" / "junk").exists(), "nothing is removed that may have counted"


def test_the_step_that_counts_may_be_saved_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    first = write(folder, 10).joinpath("manifest.json").stat()
    assert write(folder, 10).joinpath("manifest.json").stat() == first
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000010"]


def test_pruning_follows_the_line_not_the_numbers(tmp_path: Path) -> None:
    """After going back to 20 what comes next is the newest, whatever numbers lie beside it."""
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 50, 60):
        write(folder, step)
    folder.point(folder.path(20))
    write(folder, 30)
    folder.prune(keep_last=1, keep_every=0)
    assert folder.latest() == folder.path(30) and folder.line() == [30] and folder.steps() == [30, 50, 60]


def test_a_line_that_is_set_aside_can_be_used_from_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 30):
        write(folder, step)
    folder.point(folder.path(10))
    assert folder.set_aside([]) is None
    aside = folder.set_aside([folder.path(20), folder.path(30)])
    assert aside == tmp_path / "abandoned-1"
    assert locate_checkpoint(aside) == aside / "step-00000030" and read_manifest(aside / "step-00000020").step == 20
    folder.point(aside / "step-00000020")
    assert folder.latest() == aside / "step-00000020" and folder.line() == [] and len(folder.everything()) == 3
    folder.prune(keep_last=1, keep_every=0)
    assert len(folder.everything()) == 3
    write(folder, 40)
    assert folder.latest() == folder.path(40)


def test_pruning_takes_the_link_not_what_it_points_to(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 10).rename(tmp_path / "moved")
    folder.path(10).symlink_to(tmp_path / "moved")
    write(folder, 20)
    folder.prune(keep_last=1, keep_every=0)
    assert folder.steps() == [20] and (tmp_path / "moved" / "manifest.json").exists()


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["save", "go back", "die before pointing"]), max_size=12), st.integers(1, 3))
def test_the_line_is_what_was_saved_since_the_last_way_back(events: list[str], keep: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder, kept = CheckpointFolder(root), list[int]()
        for event in events:
            following = kept[-1] + 1 if kept else 1
            if event == "save":
                write(folder, following)
                folder.prune(keep_last=keep, keep_every=0)
                kept = [*kept, following][-keep:]
            elif event == "go back" and kept:
                folder.point(folder.path(kept[0]))
                kept = kept[:1]
                folder.set_aside([folder.path(step) for step in folder.steps() if step not in folder.line()])
            elif event == "die before pointing" and kept:
                pointer = (folder.root / "latest").read_text()
                write(folder, following)
                (folder.root / "latest").write_text(pointer)
            assert folder.line() == kept and folder.latest() == (folder.path(kept[-1]) if kept else None)


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 30, 40, 50):
        write(folder, step)
    folder.prune(keep_last=2, keep_every=20)
    assert folder.steps() == [20, 40, 50]
    folder.prune(keep_last=1, keep_every=0)
    assert folder.steps() == [50]


@pytest.mark.parametrize(
    "text", ["step-00000099", "../elsewhere", "", "\x00\xff", "abandoned-1/step-00000010", "step-1"]
)
def test_a_pointer_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 10)
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"which is no checkpoint beside it; write checkpoint.resume: PATH"):
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
