"""Where checkpoints lie, and when one counts.

    checkpoints/
      latest                       the name of the newest one, a line of text
      step-00000300/
        manifest.json              format, step, position, checksums of all other files and of itself
        config.yaml                the run's settings
        huggingface/               the model's and the tokenizer's files as transformers reads them, without weights
        data.json                  where a streamed data set goes on, if there is one
        shard-0000i-model-....safetensors     what rank i - 1 wrote

A checkpoint is written to a folder whose name begins with a dot, and renamed when every file of it is on disk; `latest`
is replaced after that, by a rename too. A job killed at any moment leaves the one before as it was. No torch here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.manifest import MANIFEST, Manifest

CONFIG, LATEST = "config.yaml", "latest"
CHECKPOINTS = "checkpoints"  # in a run's folder
HUGGINGFACE, DATA = "huggingface", "data.json"  # in a checkpoint
_PREFIX, _PARTIAL = "step-", ".partial"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        root: Their folder; need not exist.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.root / f"{_PREFIX}{step:08d}"

    def partial(self, step: int) -> Path:
        """Where that checkpoint is written before it counts."""
        return self.root / f".{_PREFIX}{step:08d}{_PARTIAL}"

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint to; what killed jobs left half-written is removed. One rank."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f".{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(left)
        folder = self.partial(step)
        folder.mkdir()
        return folder

    def publish(self, step: int, manifest: Manifest) -> Path:
        """Makes the written checkpoint count, as the latest. One rank, when all files are closed."""
        partial, final = self.partial(step), self.path(step)
        _write_durably(partial / MANIFEST, manifest.to_json())
        for name in manifest.files:
            _sync(partial / name)
        for folder in {(partial / name).parent for name in manifest.files} | {partial}:
            _sync(folder)
        if final.exists():  # from before a resume
            shutil.rmtree(final)
        partial.rename(final)
        _write_durably(self.root / (LATEST + ".new"), final.name + "\n")
        (self.root / (LATEST + ".new")).rename(self.root / LATEST)
        _sync(self.root)
        return final

    def prune(self, *, keep_last: int, keep_every: int) -> None:
        """Removes what need not be kept. One rank."""
        steps = self.steps()
        for step in steps[:-keep_last]:
            if not (keep_every and step % keep_every == 0):
                shutil.rmtree(self.path(step))

    def steps(self) -> list[int]:
        """Steps of all published checkpoints, ascending."""
        names = (folder.name.removeprefix(_PREFIX) for folder in self.root.glob(f"{_PREFIX}*") if folder.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> Path | None:
        """The newest published checkpoint; None if there is none.

        Raises:
            CheckpointError: `latest` names something that is not there.
        """
        pointer = self.root / LATEST
        if not pointer.exists():
            return None
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        folder = self.root / name
        if not name.startswith(_PREFIX) or "/" in name or not folder.is_dir():
            others = ", ".join(str(self.path(step)) for step in self.steps()) or "none"
            raise CheckpointError(
                f"{pointer} names {name!r}, which is no checkpoint beside it; write --checkpoint.resume PATH with one "
                f"that is there ({others}), or --checkpoint.resume never"
            )
        return folder


def locate_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: its own folder, or a run's folder or that of its checkpoints for the latest.

    Raises:
        CheckpointError: There is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; write a checkpoint's, e.g. RUN_DIR/{CHECKPOINTS}/step-00001000")
    if (path / MANIFEST).is_file():
        return path
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found = CheckpointFolder(root).latest()
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; write a checkpoint's folder, or that of a run which has saved one"
        )
    return found


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
