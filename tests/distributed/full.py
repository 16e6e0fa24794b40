"""`launch/train.py` beside something that fills its disk: `python full.py FILLER FROM UNTIL settings...`

The file FILLER takes all room before step FROM (from 0) and is removed before step UNTIL.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def fill(path: Path) -> None:
    """Writes until nothing goes in any more, to the last byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        for size in (2**16, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)


if __name__ == "__main__":
    filler, begin, end, *settings = sys.argv[1:]
    from loqt_scale.cli import run_command
    from loqt_scale.training.trainer import Trainer

    whole = Trainer.step

    def step(self: Trainer, number: int) -> None:
        if number == int(begin):
            fill(Path(filler))
        elif number == int(end):
            os.unlink(filler)
        whole(self, number)

    Trainer.step = step  # type: ignore[method-assign]
    sys.exit(run_command("train", settings, prog="full.py"))
