"""From one line of a run's checkpoints to another.

    copies of what changes    a full disk ends it here, and nothing has changed
    `latest`                  one rename, which decides
    moves                     they need no room, and the next start goes on with them after a kill

No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from loqt_scale.checkpoint.folder import CHECKPOINTS, HISTORY, CheckpointFolder, put_in_place, stage
from loqt_scale.checkpoint.records import Finished


class LineChange:
    """What a start does to the checkpoints of its run's folder. One rank.

    Args:
        run_dir: The run's folder.
        newest: What the run goes on from, directly in its checkpoints' folder or in an `abandoned-N` there; None:
            nothing.

    Attributes:
        others: Steps of the checkpoints that are not of its line, ascending.
        aside: Where they are now.
    """

    def __init__(self, run_dir: Path, newest: Path | None) -> None:
        self._run_dir, self._newest = run_dir, newest
        self._folder = CheckpointFolder(run_dir / CHECKPOINTS)
        self._common = self._folder.line_of(newest)
        self.others = [step for step in self._folder.steps() if step not in self._common]
        self.aside: Path | None = None
        self._staged: list[Path] = []

    @property
    def brings_back(self) -> bool:
        """Whether the line was set aside."""
        return self._newest is not None and self._newest.parent != self._folder.root

    def make(self, records: Mapping[str, str]) -> None:
        """Changes to the line.

        Args:
            records: Texts of files of the run's folder that belong to it, by name.

        Raises:
            OSError: There is no room for the copies; nothing has been changed.
            CheckpointError: A checkpoint cannot be moved.
        """
        self._copy(records)
        if self._newest is not None and not self._folder.points_at(self._newest):
            self._folder.point(self._newest)
        for new in self._staged[: len(records)]:
            put_in_place(new)
        if self.aside is not None:
            self._folder.move_aside(map(self._folder.path, self.others), self.aside)
            if (self.aside / Finished.FILE).is_file():  # it is of the line that is left
                (self._run_dir / Finished.FILE).unlink(missing_ok=True)
        for new in self._staged[len(records) :]:  # not before its old content lies with the checkpoints of its line
            put_in_place(new)
        if self.brings_back and self._newest is not None:
            self._folder.bring_back(self._newest)

    def _copy(self, records: Mapping[str, str]) -> None:
        try:
            for name, text in records.items():
                self._staged.append(self._run_dir / f"{name}.new")
                stage(self._run_dir / name, text)
            if self.brings_back:
                self._copy_metrics_back()
            if self.others:
                found = [path for name in HISTORY if (path := self._run_dir / name).is_file()]
                self.aside = self._folder.begin_aside(self._common, found)
        except OSError:
            for new in self._staged:
                with suppress(OSError):
                    new.unlink(missing_ok=True)
            raise

    def _copy_metrics_back(self) -> None:
        assert self._newest is not None
        metrics = self._newest.parent / HISTORY[0]
        if metrics.is_file():
            self._staged.append(self._run_dir / f"{HISTORY[0]}.new")
            shutil.copyfile(metrics, self._staged[-1])
