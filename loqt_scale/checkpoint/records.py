"""What a run's folder says of the run as a whole: how it began, and how it ended.

    begun.json       which checkpoint it began from, if any, and by which setting
    finished.json    that it has been trained, evaluated and summed up, and which checkpoint is its last

Both are replaced by a rename. Whatever cannot be read as such a record is none: a run without the second is not over.
No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from loqt_scale.checkpoint.files import file_digest
from loqt_scale.checkpoint.folder import replace_durably
from loqt_scale.checkpoint.manifest import MANIFEST


class Record(BaseModel):
    """A file of a run's folder."""

    FILE: ClassVar[str]
    model_config = ConfigDict(strict=True, frozen=True)

    def write(self, run_dir: Path) -> None:
        """Replaces the folder's record of this kind."""
        replace_durably(run_dir / self.FILE, self.text())

    def text(self) -> str:
        """What is in the file."""
        return self.model_dump_json(indent=1) + "\n"


class Begun(Record):
    """How the run of a folder began.

    Args:
        asked: What `checkpoint.resume` said: auto, never, or a path, absolute and without links.
        job: The job that began it, the same in each of its restarts.
        checkpoint: What it began from; empty: nothing.
        identity: See `identity`; empty without a checkpoint.
        origin: What `asked` was when it began from another run's checkpoint, if it has gone back to one of its own
            since then.
        origin_identity: And that checkpoint's.
    """

    FILE = "begun.json"

    asked: str
    job: str
    checkpoint: str = ""
    identity: str = ""
    origin: str = ""
    origin_identity: str = ""


class Finished(Record):
    """That a run is over.

    Args:
        step: Steps it was trained for.
        identity: Of the checkpoint of that step. The record counts only while `latest` names that one.
        loss_before: Held-out loss before training, in nats.
        loss_after: And after.
    """

    FILE = "finished.json"
    model_config = ConfigDict(ser_json_inf_nan="strings", strict=False)

    step: int
    identity: str
    loss_before: float
    loss_after: float


R = TypeVar("R", bound=Record)


def read_record(run_dir: Path, kind: type[R]) -> R | None:
    """The folder's record of a kind; None if there is none that can be read."""
    try:
        return kind.model_validate_json((run_dir / kind.FILE).read_bytes())
    except (OSError, ValueError):
        return None


def identity(checkpoint: Path) -> str:
    """What tells a checkpoint from all others, wherever it lies and by whatever path: the digest of its manifest."""
    return file_digest(checkpoint / MANIFEST)
