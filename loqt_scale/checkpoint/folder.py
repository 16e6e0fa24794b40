"""Where checkpoints lie, and when one counts.

    checkpoints/
      latest                       the name of the newest one, a line of text
      step-00000300/
        manifest.json              format, step, position, checksums of all other files and of itself
        config.yaml                the run's settings
        huggingface/               the model's and the tokenizer's files as transformers reads them, without weights
        data.json                  which text was read; of a streamed data set, where it goes on
        shard-0000i-model-....safetensors     what rank i - 1 wrote
      abandoned-1/                 checkpoints of a line that the run has left, with a `latest` of their own, and
        ancestors                  digests of the manifests of earlier ones, which both lines came of

A checkpoint is written to a folder whose name begins with a dot, and renamed when every file of it is on disk; `latest`
is replaced after that, by a rename too. A job killed at any moment leaves the one before as it was. No torch here.

The checkpoints up to `latest`'s are one line: each came of the one before. A run that goes back to an earlier one
points `latest` at it, which is all that decides, and sets aside what is no longer of its line. A line that was set
aside is brought back in the same way: `latest` names its end, where it lies; the other line makes room; it is moved.
Only names that this module writes count; whatever else lies here is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError, ListedFiles, file_digest, read_inside
from loqt_scale.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from loqt_scale.errors import advice_on, named

CONFIG, LATEST = "config.yaml", "latest"
CHECKPOINTS = "checkpoints"  # in a run's folder
HUGGINGFACE, DATA = "huggingface", "data.json"  # in a checkpoint
HISTORY = ("metrics.jsonl", "finished.json")  # what an abandoned-N holds of the run's folder
_ASIDE, _ANCESTORS = "abandoned-", "ancestors"
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

    @property
    def has_lost_latest(self) -> bool:
        """Whether checkpoints lie here, and no `latest`: somebody has removed it, or a job was killed at its first."""
        return self._pointed() is None and bool(self.steps())

    def points_at(self, checkpoint: Path) -> bool:
        """Whether `latest` names this checkpoint, there or not."""
        return self._pointed() == checkpoint.relative_to(self.root).as_posix()

    def prune(self, *, keep_last: int, keep_every: int, kept: Callable[[Path], bool] = lambda _: False) -> None:
        """Removes of the line that `latest` ends what need not be kept. One rank.

        Args:
            keep_last: The newest so many stay.
            keep_every: Those of a multiple of so many steps stay; 0: none.
            kept: Whether one stays all the same.

        Raises:
            OSError: One cannot be removed.
        """
        for step in self.line()[:-keep_last]:
            if not (keep_every and step % keep_every == 0) and not kept(self.path(step)):
                self._remove(step)

    def _remove(self, step: int) -> None:
        path, doomed = self.path(step), self.root / f".step-{step:08d}.pruned"
        if path.is_symlink():  # on another disk, perhaps: what it points to is not ours to remove
            path.unlink()
        else:
            path.rename(doomed)  # first: half of a checkpoint must not have a checkpoint's name
            shutil.rmtree(doomed)

    def set_aside(self, checkpoints: Iterable[Path]) -> Path | None:
        """Moves checkpoints out of the line, to a folder `abandoned-N` in which they can be used as before. One rank.

        Args:
            checkpoints: Their folders, directly in this one, by ascending step.

        Returns:
            The new folder; None if there was nothing to move.

        Raises:
            CheckpointError: One cannot be moved.
        """
        moving = list(checkpoints)
        if not moving:
            return None
        aside = self.begin_aside([])
        self.move_aside(moving, aside)
        return aside

    def begin_aside(self, common: Iterable[int], history: Iterable[Path] = ()) -> Path:
        """A folder `abandoned-N` for a line that is left, with all in it that needs room on the disk. One rank.

        Args:
            common: Steps of the checkpoints here that this line came of, and that stay.
            history: Files that are copied into it.

        Raises:
            OSError: It cannot be written; nothing of it is left.
        """
        aside = self._new_aside()
        try:
            for path in history:
                shutil.copyfile(path, aside / path.name)
            write_durably(aside / _ANCESTORS, "".join(f"{self._digest(step)}\n" for step in common))
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return aside

    def move_aside(self, checkpoints: Iterable[Path], aside: Path) -> None:
        """Moves checkpoints to where `begin_aside` has made room. One rank.

        Raises:
            CheckpointError: One cannot be moved.
        """
        moving = list(checkpoints)[::-1]  # the newest first, so that `latest` there never names what is not there
        try:
            for path in moving:
                _move(path, aside / path.name)
                if path == moving[0]:
                    replace_durably(aside / LATEST, path.name + "\n")
        except OSError as error:
            why = f"({error.strerror or error}); {advice_on(error)}"
            raise CheckpointError(f"{moving[0]} cannot be moved to {aside} {why}") from None
        _sync(self.root)

    def bring_back(self, newest: Path) -> None:
        """Moves a line that was set aside, up to `newest`, back to where runs go on. One rank.

        `latest` names `newest` already, and nothing lies here but what this line came of. Later ones stay aside. After
        a kill the same call goes on.

        Raises:
            CheckpointError: One cannot be moved.
        """
        aside = CheckpointFolder(newest.parent)
        steps = [step for step in aside.steps() if step <= _step_of(newest)]
        try:
            known = sorted(self._ancestors(aside.root) | {aside._digest(step) for step in steps})
            replace_durably(aside.root / _ANCESTORS, "".join(f"{digest}\n" for digest in known))
            for step in steps:  # the newest last: `latest` names it
                if os.path.lexists(self.path(step)):  # none of ours, or it is there twice
                    self.set_aside([self.path(step)])
                _move(aside.path(step), self.path(step))
            self.point(self.root / newest.name)
        except OSError as error:
            raise CheckpointError(f"{newest} cannot be moved to {self.root} ({error.strerror or error})") from None
        if not aside.steps():
            self._remove_aside(aside.root)

    def _remove_aside(self, aside: Path) -> None:
        """All of its line is back; what is none of ours stays."""
        for name in (LATEST, _ANCESTORS, *HISTORY):
            (aside / name).unlink(missing_ok=True)
        with suppress(OSError):
            aside.rmdir()

    def _new_aside(self) -> Path:
        """Of a number that was not in use; or the last one, if a killed job has left it without a checkpoint."""
        numbers = [int(path.name.removeprefix(_ASIDE)) for path in self._asides()]
        last, following = (self.root / f"{_ASIDE}{max(numbers, default=0) + more}" for more in (0, 1))
        if last.is_dir() and {path.name for path in last.iterdir()} <= {_ANCESTORS, *HISTORY}:
            return last
        following.mkdir()
        return following

    def _asides(self) -> list[Path]:
        found = (path for path in self.root.glob(f"{_ASIDE}*") if re.fullmatch(rf"{_ASIDE}\d+", path.name, re.ASCII))
        return sorted(found)

    def _digest(self, step: int) -> str:
        return file_digest(self.path(step) / MANIFEST)

    def _ancestors(self, aside: Path) -> set[str]:
        try:
            return set((aside / _ANCESTORS).read_text("ascii").split())
        except (OSError, ValueError):
            return set()

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
        return self.line_of(self.latest())

    def line_of(self, newest: Path | None) -> list[int]:
        """Steps of what lies here of the line that a checkpoint ends, here or in an `abandoned-N`; None: nothing."""
        if newest is None:
            return []
        if newest.parent == self.root:
            return [step for step in self.steps() if step <= _step_of(newest)]
        known = self._ancestors(newest.parent)
        return [step for step in self.steps() if self._digest(step) in known]

    def everything(self) -> list[Path]:
        """All checkpoints, those that have been set aside too."""
        folders = map(CheckpointFolder, [self.root, *self._asides()])
        return [folder.path(step) for folder in folders for step in folder.steps()]

    def latest(self) -> Path | None:
        """The checkpoint that a run goes on from; None if there is none. Without `latest` it is the newest whole one.

        Raises:
            CheckpointError: `latest` names something that is not there, or the folder's disk is not there.
        """
        self._refuse_missing_disk()
        name = self._pointed()
        if name is None:
            return next((path for path in map(self.path, reversed(self.steps())) if _is_whole(path)), None)
        aside, _, last = name.rpartition("/")
        known = _STEP.fullmatch(last) and (not aside or re.fullmatch(rf"{_ASIDE}\d+", aside, re.ASCII))
        if known and aside and not (self.root / name).exists() and self._is_back(self.root / aside, last):
            return self.root / last
        if not known or not (self.root / name).is_dir():
            what = f"names {name!r}, which is no checkpoint beside it"
            raise CheckpointError(f"{self.root / LATEST} {what}; {self._instead()}")
        return self.root / name

    def _is_back(self, aside: Path, name: str) -> bool:
        """Whether a job was killed after the end of a line had been moved back, and before `latest` said so."""
        manifest = self.root / name / MANIFEST
        return manifest.is_file() and file_digest(manifest) in self._ancestors(aside)

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
            f"write checkpoint.resume: PATH with one that is there ({others}), or checkpoint.resume: never to start "
            "anew"
        )

    def _refuse_missing_disk(self) -> None:
        if self.root.is_symlink() and not self.root.exists():
            raise CheckpointError(
                f"{self.root} is a link to {os.readlink(self.root)}, which is not there; mount its disk, make that "
                "folder, or write another train.run_dir"
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


def _is_whole(checkpoint: Path) -> bool:
    """Whether its manifest can be read, and all files that it lists are there, of their sizes."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        return False
    return not ListedFiles(checkpoint, manifest.files, manifest.sizes).absent()


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _move(path: Path, target: Path) -> None:
    """Renames a folder; a link to one, which may be relative, becomes an absolute one to the same."""
    if not path.is_symlink():
        path.rename(target)
        return
    target.symlink_to(os.path.join(os.path.realpath(path.parent), os.readlink(path)))
    path.unlink()


def write_durably(path: Path, text: str) -> None:
    """Writes a file and waits until it is on disk."""
    with named(path):
        path.write_text(text, encoding="utf-8")
        _sync(path)


def replace_durably(path: Path, text: str) -> None:
    """The same in one go: whoever reads the file, even after a kill, reads the old text or the new one."""
    put_in_place(stage(path, text))


def stage(path: Path, text: str) -> Path:
    """Writes what is to replace a file beside it, durably; what needs room on the disk happens here."""
    new = path.with_name(path.name + ".new")
    write_durably(new, text)
    return new


def put_in_place(new: Path) -> None:
    """Replaces a file by what has been staged for it."""
    new.replace(new.with_suffix(""))
    _sync(new.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
