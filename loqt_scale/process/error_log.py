"""Where the traceback of an unexpected exception is kept, so that a person sees one line and where to look.

    <run_dir>/error.log           rank 0
    <run_dir>/error.rank-3.log    rank 3

Before there is a run folder (or where it cannot be written to), a file of the same name in the system's folder for
temporary files. Errors are added at the end: a run that is restarted keeps those of its earlier attempts.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from datetime import datetime
from pathlib import Path

from loqt_scale.process.environment import rank_label

_folder: Path | None = None


def keep_errors_in(folder: str | os.PathLike[str] | None) -> None:
    """Names the run folder, once it is made; None: there is none."""
    global _folder
    _folder = None if folder is None else Path(folder).absolute()


def log_error(error: BaseException) -> Path | None:
    """Adds an exception's traceback to this rank's file.

    Returns:
        The file; None if it could be written nowhere.
    """
    rank = rank_label()
    name = "error.log" if rank == "0" else f"error.rank-{rank}.log"
    elsewhere = Path(tempfile.gettempdir()) / f"loqt_scale-{os.getpid()}-{name}"
    places = [elsewhere] if _folder is None else [_folder / name, elsewhere]
    return next((place for place in places if _append(place, _described(error, rank))), None)


def _described(error: BaseException, rank: str) -> str:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    title = f"==== {now}  {socket.gethostname()}, process {os.getpid()}, rank {rank}: {' '.join(sys.argv)}"
    return "\n".join([title, "".join(traceback.format_exception(error))])


def _append(path: Path, text: str) -> bool:
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError:
        return False
    return True
