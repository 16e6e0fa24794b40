"""Ten times killed by SIGKILL: does the run end with the losses of a run that nothing happened to?

On 1 process and on 2 ranks (FSDP2, torchrun). Rank 0 is killed inside a merge, then inside a save; then eight times the
whole job, launcher and all ranks at once, after a random time. Each time the same command is given again; the last one
is left alone. Nothing is measured but equality, bit for bit, of every step's loss.

    python benchmarks/kills.py               # about ten minutes on two cores
    python benchmarks/kills.py --kills 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from common import ROOT, launcher, publish, run_job, table

SETTINGS = {
    "model.preset": "llama_nano",
    "data.seq_len": "64",
    "data.max_eval_sequences": "8",
    "loqt.rank": "16",
    "loqt.merge.gap": "20",
    "loqt.merge.schedule": "constant",
    "optim.lr": "5e-3",
    "train.global_batch_size": "8",
    "checkpoint.every": "7",
}


# rank 0 dies at the 30th layer that is merged (the third merge), at the 4th checkpoint that is published
EXACT = {"merge": ["merge", "30"], "save": ["save publishes", "4"]}


def words(steps: int, more: list[str]) -> list[str]:
    """The settings of a run as command-line words."""
    return [f"--{key}={value}" for key, value in SETTINGS.items()] + [f"--train.steps={steps}", *more]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; fails on a step that is there twice."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert len(set(steps)) == len(steps), "a step was logged twice"
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def started(run_dir: Path, arguments: list[str], ranks: int, death: list[str]) -> subprocess.Popen[bytes]:
    """The job, in a process group of its own; `death` are the words that `tests/distributed/killed.py` takes first."""
    program = ROOT / ("tests/distributed/killed.py" if death else "launch/train.py")
    script = [str(program), *death, *arguments, "--train.run_dir", str(run_dir), "--train.progress=off"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*launcher(ranks), *script], env=environment, start_new_session=True, **quiet)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and to every descendant (torchrun puts its ranks into sessions of their own)."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for pid, parent in (map(int, line.split()) for line in listing.splitlines()):
        children.setdefault(parent, []).append(pid)
    doomed = [process.pid]
    for pid in doomed:
        doomed += children.get(pid, [])
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def killed_run(run_dir: Path, arguments: list[str], ranks: int, kills: int, rng: random.Random) -> list[str]:
    """Runs a job to its end through `kills` deaths; what each of them interrupted."""
    met: list[str] = []
    metrics, marker = run_dir / "metrics.jsonl", run_dir.with_name(f"{run_dir.name}-mark")
    for place, death in EXACT.items():
        assert started(run_dir, arguments, ranks, [*death, f"{marker}-{place}"]).wait() != 0
        met.append(f"step {max(losses_so_far(metrics))}, inside a {place}")
        print(f"{ranks} rank(s), kill {len(met)}: {met[-1]}", flush=True)
    while True:
        process = started(run_dir, arguments, ranks, [])
        if len(met) >= kills:
            assert process.wait() == 0, "the job that was left alone failed"
            return met
        seen = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > seen):
            time.sleep(0.01)  # until it trains: being killed while Python starts up proves nothing
        time.sleep(rng.uniform(0.0, 4.0))
        if process.poll() is not None:
            raise SystemExit(f"the run was over before its kill {len(met) + 1}; give it more --steps")
        kill_all(process)
        step = max(losses_so_far(metrics), default=0)
        writing = any((run_dir / "checkpoints").glob(".step-*"))
        met.append(f"step {step}" + (", while a checkpoint was written" if writing else ""))
        print(f"{ranks} rank(s), kill {len(met)}: {met[-1]}", flush=True)


def losses_so_far(metrics: Path) -> list[int]:
    """Steps in a metrics file whose last line may be cut."""
    steps = []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            break
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows, rng = [], random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            more = ["--parallel.strategy=fsdp"] if ranks > 1 else []
            arguments, root = words(options.steps, more), Path(folder)
            run_job(arguments, ranks=ranks, run_dir=root / f"unbroken-{ranks}")
            met = killed_run(root / f"killed-{ranks}", arguments, ranks, options.kills, rng)
            unbroken, killed = losses(root / f"unbroken-{ranks}"), losses(root / f"killed-{ranks}")
            differing = sum(unbroken[step] != killed.get(step) for step in unbroken)
            inside = [sum(what in text for text in met) for what in ("merge", "checkpoint was written")]
            rows.append([ranks, len(met), inside[0], inside[1] + 1, len(unbroken), differing])
            print("; ".join(met))
            assert differing == 0 and len(killed) == len(unbroken)
    header = ["ranks", "kills", "inside a merge (known)", "inside a save (known)", "steps", "steps whose loss differs"]
    note = (
        f"llama_nano, a save every {SETTINGS['checkpoint.every']} steps, a merge every {SETTINGS['loqt.merge.gap']}; "
        f"two kills at these places, the others at random moments (seed {options.seed}), up to 4 s after a job has "
        "begun to train."
    )
    command = "python benchmarks/kills.py" + (f" --kills {options.kills}" if options.kills != 10 else "")
    publish("Killed at random moments", command, table(header, rows) + "\n\n" + note)


if __name__ == "__main__":
    main()
