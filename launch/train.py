"""One entry for every launcher: `python launch/train.py --config …`, or the same after torchrun's own options.

Works from a checkout, installed or not.
"""

import sys
from pathlib import Path

try:
    import loqt_scale  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loqt_scale.entry import enter

if __name__ == "__main__":
    sys.exit(enter("train", sys.argv[1:], prog="launch/train.py"))
