"""Which process is which: numbers are used again, so a process is its number and the moment at which it began.

On Linux the kernel counts that moment in ticks since the boot and never changes it. Seconds since 1970, which psutil
makes of it, move by as much as the clock is set.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path


def place() -> str:
    """This boot of this host and this set of process numbers: containers of one host may share its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def began(pid: int) -> int | None:
    """When a process of this place began, in ticks since the boot; None if it is not there, or this is not Linux."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # the name, in brackets, may hold anything
