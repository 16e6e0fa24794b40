"""Where a run starts: from nothing, from one of its own checkpoints, from another run's, or not at all, being over.

`decide_start` only reads. What it decides for each state of the run's folder and each `checkpoint.resume` is the table
in docs/checkpoints.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loqt_scale.checkpoint.changes import (
    Changes,
    changed_settings,
    changes_between,
    check_changes,
    describe,
    of_another_run,
)
from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CHECKPOINTS, CONFIG, LATEST, CheckpointFolder, locate_checkpoint
from loqt_scale.checkpoint.manifest import read_manifest
from loqt_scale.checkpoint.opened import read_settings
from loqt_scale.checkpoint.records import Begun, Finished, identity, read_record
from loqt_scale.config import RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.process.environment import OWN, Environment, is_restart


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Args:
        folder: What becomes of the run's folder. new = a run that it holds is another one's, which must make room;
            kept = the run in it goes on; back = it goes back to an earlier checkpoint, or to one set aside; over = the
            run in it is finished, nothing is to be done.
        begun: What to write down of how it began.
        checkpoint: What it goes on from; None: nothing.
        identity: That checkpoint's.
        own: The same checkpoint where it lies among the run's own; None if it is another run's.
        finished: How it ended, if it is over.
        again: Whether the run in the folder is an earlier attempt of this very job, which has saved nothing.
        notes: Lines for people.
    """

    folder: Literal["new", "kept", "back", "over"]
    begun: Begun
    checkpoint: Path | None = None
    identity: str = ""
    own: Path | None = None
    finished: Finished | None = None
    again: bool = False
    notes: tuple[str, ...] = ()


def decide_start(config: RunConfig, environment: Environment = OWN, *, job: str = "") -> Start:
    """Decides where a run starts. Reads manifests and settings, no tensors. One rank.

    Args:
        config: The run.
        environment: Where launchers say whether this is a restart.
        job: What names the job, the same in each of its restarts.

    Raises:
        CheckpointError: What it should go on from cannot be used, or settings have changed since (named, old and new).
    """
    return _Decision(config, job, restarted=is_restart(environment)).start()


class _Decision:
    """One decision; `again`: an earlier attempt of this very job began the run in the folder."""

    def __init__(self, config: RunConfig, job: str, *, restarted: bool) -> None:
        self.config, self.job = config, job
        self.run_dir = Path(config.train.run_dir)
        self.folder = CheckpointFolder(self.run_dir / CHECKPOINTS)
        self.before = read_record(self.run_dir, Begun)
        self.again = restarted and self.before is not None and self.before.job == job != ""

    def start(self) -> Start:
        wanted = self.config.checkpoint.resume
        if wanted == "never" and not self.again:
            return self._anew("never")
        if wanted in ("auto", "never"):
            found = self._own(may_be_another=True) or self._over_without_checkpoints() or self._where_it_began()
            return found or self._anew(wanted)
        return self._from_path(Path(wanted))

    def _anew(self, asked: str, *notes: str) -> Start:
        return Start(folder="new", begun=Begun(asked=asked, job=self.job), again=self.again, notes=notes)

    def _own(self, *, may_be_another: bool) -> Start | None:
        """Going on with the run in the folder; None if it has saved nothing."""
        newest = self.folder.latest()
        if newest is None:
            return None
        changes = changed_settings(newest, self.config)
        finished = self._finished(newest)
        if finished is not None and may_be_another and (other := of_another_run(changes)):
            return self._anew("auto", self._of_another(other))
        start = self._going_on(newest, changes, "kept")
        notes = (*self._without_latest(newest), *start.notes)
        start = replace(start, own=newest, begun=self.before or start.begun, notes=notes)
        if finished is not None and finished.step == self.config.train.steps:
            return replace(start, folder="over", finished=finished)
        return start

    def _without_latest(self, newest: Path) -> tuple[str, ...]:
        if not self.folder.has_lost_latest:
            return ()
        return (f"{self.folder.root / LATEST} is not there; {newest.name} is the newest whole checkpoint beside it",)

    def _over_without_checkpoints(self) -> Start | None:
        """A finished run whose checkpoints somebody has removed, to save room say."""
        finished, steps = read_record(self.run_dir, Finished), self.config.train.steps
        if finished is None:
            return None
        if other := of_another_run(self._changed_since()):
            return self._anew("auto", self._of_another(other))
        if finished.step != steps:
            raise CheckpointError(
                f"the run in {self.run_dir} is finished after {finished.step} steps, and its checkpoints are not there "
                f"any more, so it cannot go on; train.steps is {steps}: put the checkpoints back, or write "
                "checkpoint.resume: never to start anew, or another train.run_dir"
            )
        begun = self.before or Begun(asked=self.config.checkpoint.resume, job=self.job)
        note = f"{self.folder.root} holds no checkpoint any more"
        return Start(folder="over", begun=begun, finished=finished, notes=(note,))

    def _changed_since(self) -> Changes:
        """Settings that have changed since the run in the folder began, as far as it still says how."""
        try:
            return changes_between(read_settings(self.run_dir / CONFIG), self.config)
        except (OSError, ConfigError):
            return {}

    def _of_another(self, changes: Changes) -> str:
        return f"{self.run_dir} holds a finished run with other settings ({describe(changes)})"

    def _where_it_began(self) -> Start | None:
        """A run that began from another run's checkpoint, and was killed before it saved one of its own."""
        before = self.before
        if before is None or not before.checkpoint:
            return None
        found = Path(before.checkpoint)
        if not found.is_dir() or identity(found) != before.identity:
            raise CheckpointError(
                f"the run in {self.run_dir} began from {found}, which is not there any more, and has saved nothing; "
                "write checkpoint.resume: PATH with another checkpoint, or checkpoint.resume: never to start anew"
            )
        return replace(self._going_on(found, changed_settings(found, self.config), "kept"), begun=before)

    def _from_path(self, path: Path) -> Start:
        """PATH is where a run begins: what its folder holds that came of it goes before."""
        asked = os.path.realpath(path)
        here = self.before is not None and asked in (self.before.asked, self.before.origin)
        if here and self._newest_or_none() is None and (over := self._over_without_checkpoints()):
            return over
        if not path.is_dir():
            return self._without_path(path, here)
        try:
            found = locate_checkpoint(path)
        except CheckpointError:
            if here and self._newest_or_none() is not None:  # of a line that was brought back the folder may be left
                return self._own_rather(path)
            raise
        read_manifest(found)
        name = identity(found)
        newest = self._newest_or_none()
        before = self.before or Begun(asked="", job="")
        origin = asked == before.origin or name == before.origin_identity  # and it has saved since
        came_of_it = here or origin or name == before.identity
        saved = newest is not None and (origin or identity(newest) not in (name, before.identity))
        if came_of_it and saved:
            return self._own_rather(path)
        begun = Begun(asked=asked, job=self.job, checkpoint=os.path.abspath(found), identity=name)
        if newest is not None and identity(newest) == name:
            start = self._own(may_be_another=False)
            assert start is not None
            return replace(start, checkpoint=found, begun=self._with_origin(begun))
        return self._begin(found, begun, came_of_it=came_of_it)

    def _begin(self, found: Path, begun: Begun, *, came_of_it: bool) -> Start:
        changes = changed_settings(found, self.config)
        own = next((path for path in self.folder.everything() if identity(path) == begun.identity), None)
        if own is not None:
            return replace(self._going_on(found, changes, "back"), begun=self._with_origin(begun), own=own)
        if not came_of_it and found.resolve().is_relative_to(self.run_dir.resolve()):
            raise CheckpointError(
                f"checkpoint.resume is '{found}', which lies inside train.run_dir '{self.run_dir}' but is none of the "
                "checkpoints of its run; write another train.run_dir"
            )
        return replace(self._going_on(found, changes, "kept" if came_of_it else "new"), begun=begun)

    def _with_origin(self, begun: Begun) -> Begun:
        """Of a run that goes on from one of its own: where it began is not forgotten."""
        before = self.before
        if before is None or before.origin:
            origin = ("", "") if before is None else (before.origin, before.origin_identity)
        else:
            elsewhere = not Path(before.checkpoint).resolve().is_relative_to(self.run_dir.resolve())
            origin = (before.asked, before.identity) if before.checkpoint and elsewhere else ("", "")
        return begun.model_copy(update={"origin": origin[0], "origin_identity": origin[1]})

    def _own_rather(self, path: Path) -> Start:
        start = self._own(may_be_another=False)
        assert start is not None
        what = "it has ended" if start.folder == "over" else f"it goes on from {start.checkpoint}"
        note = (
            f"{self.run_dir} holds a run that began from {path}: {what}; to begin there once more, write another "
            "train.run_dir"
        )
        return replace(start, notes=(note, *start.notes))

    def _without_path(self, path: Path, here: bool) -> Start:
        """PATH has been pruned, or moved away, since a run began there."""
        start = self._own_rather(path) if here and self._newest_or_none() is not None else None
        if start is None:
            raise CheckpointError(
                f"checkpoint.resume is '{path}', which is no folder; write auto, never or a checkpoint's folder, "
                f"e.g. RUN_DIR/{CHECKPOINTS}/step-00001000"
            )
        return start

    def _newest_or_none(self) -> Path | None:
        """What `latest` names, if that is there: a PATH is the way on where it is not."""
        try:
            return self.folder.latest()
        except CheckpointError:
            if self.folder.root.is_dir():
                return None
            raise

    def _finished(self, newest: Path) -> Finished | None:
        record = read_record(self.run_dir, Finished)
        return record if record is not None and record.identity == identity(newest) else None

    def _going_on(self, checkpoint: Path, changes: Changes, folder: Literal["kept", "back", "new"]) -> Start:
        manifest, steps = read_manifest(checkpoint), self.config.train.steps
        notes, step = check_changes(checkpoint, manifest, changes, self.config), manifest.step
        if step > steps:
            raise CheckpointError(
                f"{checkpoint} is after step {step}, but train.steps is {steps}; write {step} or more to go on, or "
                "checkpoint.resume: never to start anew"
            )
        begun = Begun(asked=self.config.checkpoint.resume, job=self.job)
        return Start(
            folder=folder, begun=begun, checkpoint=checkpoint, identity=identity(checkpoint), notes=tuple(notes)
        )
