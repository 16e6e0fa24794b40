"""What every benchmark shares: running a job, describing the machine, printing a table and keeping it in RESULTS.md."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed works too
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def hardware() -> str:
    """CPU model and count, and the GPU if there is one."""
    import torch

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def commit() -> str:
    """Short hash of the checkout, with `+` if it has changes."""
    if shutil.which("git") is None:
        return "unknown"
    run = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    changed = [
        line for line in run("status", "--porcelain", "--", "loqt_scale", "benchmarks/*.py").splitlines() if line
    ]
    return (run("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def publish(
    title: str, command: str, text: str, *, keep: bool = True, show: bool = True, made: str | None = None
) -> None:
    """Prints a result (unless `show` is off) and puts it into RESULTS.md in place of one with the same title.

    With `keep` off it is printed only. `made` says when, of which commit and where, if that is not now, this and here.
    """
    if not keep:
        print(text)
        return
    section = f"## {title}\n\n`{command}`  \n{made or f'{date.today()}, commit {commit()}, {hardware()}'}\n\n{text}\n"
    if show:
        print("\n" + section, flush=True)
    old = (
        RESULTS.read_text(encoding="utf-8")
        if RESULTS.exists()
        else "# Results\n\nEach table is printed by its script.\n"
    )
    head, *sections = old.split("\n## ")
    kept = [part for part in sections if part.partition("\n")[0] != title]
    parts = [head.rstrip() + "\n", *(f"## {part.rstrip()}\n" for part in kept), section]
    written = RESULTS.with_suffix(".new")  # whoever is killed while writing leaves the old tables
    written.write_text("\n".join(parts), encoding="utf-8")
    written.replace(RESULTS)


def launcher(ranks: int) -> list[str]:
    """The words that start a script on so many ranks of this machine."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run_job(arguments: Sequence[str], *, ranks: int = 1, run_dir: Path, threads: int = 1) -> list[dict[str, float]]:
    """Runs launch/train.py as a user would, in a process (or several) of its own; returns its metrics."""
    script = [str(ROOT / "launch" / "train.py"), *arguments, "--train.run_dir", str(run_dir), "--train.progress", "off"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*launcher(ranks), *script], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(script)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
