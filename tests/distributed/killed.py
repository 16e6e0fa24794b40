"""`launch/train.py` with a death in it: `python killed.py POINT CALL MARKER settings...`

At the CALL-th call of POINT this process is killed by SIGKILL, unless the file MARKER exists already (so that what
starts the job anew lives). Nothing in the product knows of this.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# name -> (module, class or None, function): killed on entry
POINTS = {
    "step": ("loqt_scale.training.trainer", "Trainer", "accumulate"),
    "merge": (
        "loqt_scale.merge.one_layer",
        "LayerMerge",
        "_carry_state",
    ),  # W, P and B of a layer are written, moments not
    "save begins": ("loqt_scale.checkpoint.folder", "CheckpointFolder", "begin"),
    "save writes": ("loqt_scale.checkpoint.write", None, "file_digest"),
    "save publishes": ("loqt_scale.checkpoint.folder", "CheckpointFolder", "publish"),
    "save points": ("loqt_scale.checkpoint.folder", None, "_sync"),
}


def arm(point: str, call: int, marker: Path) -> None:
    """Replaces a function by one that counts its calls and dies at the given one."""
    module_name, class_name, name = POINTS[point]
    module = importlib.import_module(module_name)
    owner = getattr(module, class_name) if class_name else module
    alive, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return alive(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    point, call, marker, *settings = sys.argv[1:]
    if os.environ.get("RANK", "0") == "0":
        arm(point, int(call), Path(marker))
    from loqt_scale.cli import run_command

    sys.exit(run_command("train", settings, prog="killed.py"))
