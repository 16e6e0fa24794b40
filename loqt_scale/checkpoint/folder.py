"""Where checkpoints lie, and when one counts.

    checkpoints/
      latest                       the name of the newest one, a line of text
      step-00000300/
        manifest.json              format, step, position, checksums of all other files and of itself
        config.yaml                the run's settings
        huggingface/               the model's and the tokenizer's files as transformers reads them, without weights
        data.json                  which text was read; of a streamed data set, where it goes on
        shard-0000i-model-....safetensors     what rank i - 1 wrote
      abandoned-1/                 checkpoints of a line that the run has left, with a `latest` of their own

A checkpoint is written to a folder whose name begins with a dot, and renamed when every file of it is on disk; `latest`
is replaced after that, by a rename too. A job killed at any moment leaves the one before as it was. No torch here.

The checkpoints up to `latest`'s are one line: each came of the one before. A run that goes back to an earlier one
points `latest` at it, which is all that decides, and sets aside what is no longer of its line. Only names that this
module writes count; whatever else lies here is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError, read_inside
from loqt_scale.checkpoint.manifest import MANIFEST, Manifest
from loqt_scale.errors import advice_on, named

CONFIG, LATEST = "config.yaml", "latest"
CHECKPOINTS = "checkpoints"  # in a run's folder
HUGGINGFACE, DATA = "huggingface", "data.json"  # in a checkpoint
_ASIDE = "abandoned-"
_LONGEST_NAME = 200  # bytes read of `latest`
_STEP = re.compile(r"step-(0\d{7}|[1-9]\d{7,})", re.ASCII)
_LEFT_OVER = re.compile(rf"\.{_STEP.pattern}\.(partial|pruned)", re.ASCII)


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        root: Their folder; need not exist.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.root / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Where that checkpoint is written before it counts."""
        return self.root / f".step-{step:08d}.partial"

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint to; what killed jobs left half-written is removed. One rank."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.iterdir():
            if _LEFT_OVER.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=left != self.partial(step))
        folder = self.partial(step)
        folder.mkdir()
        return folder

    def publish(self, step: int, manifest: Manifest) -> Path:
        """Makes the written checkpoint count, as the latest. One rank, when all files are closed."""
        partial, final = self.partial(step), self.path(step)
        write_durably(partial / MANIFEST, manifest.to_json())
        for name in manifest.files:
            _sync(partial / name)
        for folder in {(partial / name).parent for name in manifest.files} | {partial}:
            _sync(folder)
        if final.is_dir() and self._pointed() == final.name:  # saved twice: nothing may happen to what counts
            shutil.rmtree(partial)
            return final
        if os.path.lexists(final):  # it never counted, or is none of ours
            self.set_aside([final])
        partial.rename(final)
        self.point(final)
        return final

    def point(self, checkpoint: Path) -> None:
        """Makes a checkpoint below this folder the one that a run goes on from. One rank."""
        replace_durably(self.root / LATEST, checkpoint.relative_to(self.root).as_posix() + "\n")

    def prune(self, *, keep_last: int, keep_every: int) -> None:
        """Removes of the line that `latest` ends what need not be kept. One rank.

        Raises:
            OSError: One cannot be removed.
        """
        for step in self.line()[:-keep_last]:
            if not (keep_every and step % keep_every == 0):
                self._remove(step)

    def _remove(self, step: int) -> None:
        path, doomed = self.path(step), self.root / f".step-{step:08d}.pruned"
        if path.is_symlink():  # on another disk, perhaps: what it points to is not ours to remove
            path.unlink()
        else:
            path.rename(doomed)  # first: half of a checkpoint must not have a checkpoint's name
            shutil.rmtree(doomed)

    def set_aside(self, checkpoints: Iterable[Path], write_more: Callable[[Path], None] | None = None) -> Path | None:
        """Moves checkpoints out of the line, to a folder `abandoned-N` in which they can be used as before. One rank.

        Args:
            checkpoints: Their folders, directly in this one, by ascending step.
            write_more: Writes what belongs to them into the new folder, before anything is moved.

        Returns:
            The new folder; None if there was nothing to move.

        Raises:
            CheckpointError: One cannot be moved.
        """
        moving = list(checkpoints)[::-1]  # the newest first, so that `latest` there never names what is not there
        if not moving:
            return None
        aside = self._new_aside()
        try:
            if write_more is not None:
                write_more(aside)
            for path in moving:
                path.rename(aside / path.name)
                if path == moving[0]:
                    replace_durably(aside / LATEST, path.name + "\n")
        except OSError as error:
            why = f"({error.strerror or error}); {advice_on(error)}"
            raise CheckpointError(f"{moving[0]} cannot be moved to {aside} {why}") from None
        _sync(self.root)
        return aside

    def _new_aside(self) -> Path:
        names = (self.root / f"{_ASIDE}{number}" for number in count(1))
        aside = next(path for path in names if not os.path.lexists(path))
        aside.mkdir()
        return aside

    def steps(self) -> list[int]:
        """Steps of all checkpoints that lie here, ascending; other things that lie here are none."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if (path / MANIFEST).is_file())
        return sorted(int(found[1]) for found in map(_STEP.fullmatch, names) if found)

    def line(self) -> list[int]:
        """Steps of `latest`'s checkpoint and of those that it came of, ascending.

        Raises:
            CheckpointError: See `latest`.
        """
        newest = self.latest()
        if newest is None or newest.parent != self.root:
            return []
        return [step for step in self.steps() if step <= int(newest.name.removeprefix("step-"))]

    def everything(self) -> list[Path]:
        """All checkpoints, those that have been set aside too."""
        asides = sorted(path for path in self.root.glob(f"{_ASIDE}*") if path.is_dir())
        return [folder.path(step) for folder in map(CheckpointFolder, [self.root, *asides]) for step in folder.steps()]

    def latest(self) -> Path | None:
        """The checkpoint that a run goes on from; None if there is none.

        Raises:
            CheckpointError: `latest` names something that is not there, or the folder's disk is not there.
        """
        self._refuse_missing_disk()
        name = self._pointed()
        if name is None:
            return None
        aside, _, last = name.rpartition("/")
        known = _STEP.fullmatch(last) and (not aside or re.fullmatch(rf"{_ASIDE}\d+", aside, re.ASCII))
        if not known or not (self.root / name).is_dir():
            what = f"names {name!r}, which is no checkpoint beside it"
            raise CheckpointError(f"{self.root / LATEST} {what}; {self._instead()}")
        return self.root / name

    def _pointed(self) -> str | None:
        """What `latest` says; None if there is no such file."""
        pointer = self.root / LATEST
        try:
            return read_inside(self.root, LATEST, _LONGEST_NAME).decode("utf-8", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"{pointer} cannot be read ({error.strerror or error}); {self._instead()}") from None

    def _instead(self) -> str:
        others = ", ".join(map(str, self.everything())) or "none"
        return (
            f"write --checkpoint.resume PATH with one that is there ({others}), or --checkpoint.resume never to start "
            "anew"
        )

    def _refuse_missing_disk(self) -> None:
        if self.root.is_symlink() and not self.root.exists():
            raise CheckpointError(
                f"{self.root} is a link to {os.readlink(self.root)}, which is not there; mount its disk, make that "
                "folder, or write another --train.run_dir"
            )


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


def write_durably(path: Path, text: str) -> None:
    """Writes a file and waits until it is on disk."""
    with named(path):
        path.write_text(text, encoding="utf-8")
        _sync(path)


def replace_durably(path: Path, text: str) -> None:
    """The same in one go: whoever reads the file, even after a kill, reads the old text or the new one."""
    new = path.with_name(path.name + ".new")
    write_durably(new, text)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
