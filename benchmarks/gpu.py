"""Everything that wants a GPU, in one command: the tests of tests/cuda, then all tables.

    python benchmarks/gpu.py                          # tests, then all parts; half an hour on an H100
    python benchmarks/gpu.py --minutes 8              # what eight minutes can answer, the most telling first
    python benchmarks/gpu.py --part memory            # one part, no tests
    python benchmarks/gpu.py --tests no               # all parts, no tests
    python benchmarks/gpu.py --quick --device cpu     # every part on tiny shapes, to see that it runs; keeps nothing

    part        what it measures
    tests       tests/cuda: kernels, merges, runs, strategies of one rank, peaks; against the CPU
    throughput  tokens/s of full-rank AdamW, LoQT, GaLore; plain and compiled
    merge       seconds of a merge over those of a step; its parts
    products    products, factorisations and Muon's steps of the 1b shape by themselves
    optimizers  updates of AdamW and Muon, with float32 and with small states
    cap         13b and 7b where torch may take 24 GB: real steps and a merge
    memory      peaks of every method at 1b and 7b
    profile     where a step's time goes, the most that a fused kernel could save
    offload     step times with what waits in host memory

Each part runs in a process of its own, so one that fails or runs out of time takes no other down; a failure ends in an
exit status that is not 0. A table is written to RESULTS.md after each of its rows. With `--minutes` each part has a
share of the time; what one leaves over goes to those after it. What is not installed (deepspeed, galore-torch) is said
by the part that wants it. On a card of less than 80 GB, what does not fit is left out or said not to fit. What the
tables are to be held against: docs/performance.md, "On a GPU".
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common import ROOT, publish

sys.path.insert(0, str(ROOT))

TESTS = "tests"
PARTS = ("throughput", "merge", "products", "optimizers", "cap", "memory", "profile", "offload")
GRACE = 10.0  # seconds to end in, after being told that the time is up


@dataclass(frozen=True)
class Task:
    """A part, or some shapes of one.

    Args:
        part: Which.
        weight: Its share of the time, against the weights of the others.
        presets: Shapes; none: all that the part has.
        compiled: Only compiled blocks of full-rank training and LoQT.
    """

    part: str
    weight: float = 1.0
    presets: tuple[str, ...] = ()
    compiled: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.part, *self.presets, *(["compiled"] if self.compiled else [])])

    def words(self) -> list[str]:
        """As a command line has it."""
        presets = ["--presets", *self.presets] if self.presets else []
        return [f"--part={self.part}", *presets, *(["--compiled-only"] if self.compiled else [])]


EVERYTHING = (Task(TESTS), *map(Task, PARTS))
# the most telling first; weights are about the seconds that each takes on an H100
IN_A_HURRY = (
    Task(TESTS, 110),
    Task("throughput", 50, ("llama_1b",), compiled=True),
    Task("throughput", 45, ("llama_350m",), compiled=True),
    Task("merge", 40, ("llama_1b",)),
    Task("optimizers", 25, ("llama_350m",)),
    Task("cap", 150, ("llama_13b",)),
    Task("cap", 80, ("llama_7b",)),
    Task("profile", 30, ("llama_1b",)),
    Task("offload", 30),
    Task("merge", 30, ("llama_350m",)),
    Task("memory", 60),
)
LEAST = 15.0  # seconds: with less a part is not begun


def run_part(options: argparse.Namespace) -> int:
    """Measures one part in this process, and publishes its table as it grows; returns the exit status."""
    if options.part == TESTS:
        return run_tests(options)
    import gpu_memory
    import gpu_optimizers
    import gpu_products
    import gpu_profile
    import gpu_speed
    import torch
    from gpu_common import Place

    from loqt_scale.strategies import resolve_device

    parts = {
        "throughput": gpu_speed.throughput,
        "merge": gpu_speed.merge,
        "products": gpu_products.products,
        "optimizers": gpu_optimizers.optimizers,
        "cap": gpu_memory.cap,
        "memory": gpu_memory.memory,
        "profile": gpu_profile.profile,
        "offload": gpu_speed.offload,
    }
    device = resolve_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    task = Task(options.part, presets=tuple(options.presets), compiled=options.compiled_only)
    command = " ".join(["python benchmarks/gpu.py", *task.words()]).replace("--part=", "--part ")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device, options.quick, Path(folder), task.presets, task.compiled)
        title = text = None
        for title, text in parts[options.part](place, 2 if options.quick else options.repeats):
            if place.cuda and not options.quick:
                publish(title, command, text, show=False)
        if title is None or text is None:
            print("nothing fitted on this device", flush=True)
            return 1
        publish(title, command, text, keep=False)
    return 0


def run_tests(options: argparse.Namespace) -> int:
    """The tests of tests/cuda; their last lines are published."""
    side_by_side = ["-n", "4"] if find_spec("xdist") is not None else []  # each waits for its own kernels
    command = [sys.executable, "-m", "pytest", "-q", "-ra", *side_by_side, "tests/cuda"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    lines: list[str] = []
    try:
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except KeyboardInterrupt:  # the time is up: pytest, which was told too, sums up
        lines += [*running.stdout, "stopped: its time was up\n"]
        print("".join(lines[-20:]), flush=True)
    status = running.wait()
    if options.device == "cuda" and not options.quick:
        publish("GPU: tests", "python -m pytest tests/cuda", f"```\n{''.join(lines[-20:])}```", show=False)
    return status


def run_all(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Each task in a process of its own, within its share of the time; returns how many failed."""
    given = [f"--device={options.device}", f"--repeats={options.repeats}", *(["--quick"] if options.quick else [])]
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    outcomes: dict[str, str] = {}
    for index, task in enumerate(tasks):
        left = None if end is None else end - time.monotonic() - GRACE
        if left is not None and left < LEAST:
            outcomes[task.name] = "not begun: the time is up"
            continue
        share = None if left is None else share_of(left, tasks[index:])
        print(f"\n==== {task.name} ====" + (f" (at most {share:.0f} s)" if share else ""), flush=True)
        started = time.monotonic()
        outcomes[task.name] = run_within([sys.executable, str(Path(__file__)), *task.words(), *given], share)
        print(f"---- {task.name}: {outcomes[task.name]}, {time.monotonic() - started:.0f} s", flush=True)
    print("\n" + "\n".join(f"{name:32} {outcome}" for name, outcome in outcomes.items()), flush=True)
    return sum(outcome.startswith("FAILED") for outcome in outcomes.values())


def share_of(seconds: float, tasks: Sequence[Task]) -> float:
    """The first task's limit: half as much again as its weight says, at the cost of the last ones."""
    share = 1.5 * seconds * tasks[0].weight / sum(task.weight for task in tasks)
    return min(seconds, max(share, LEAST))


def run_within(command: list[str], seconds: float | None) -> str:
    """Runs a command, told to end when its time is up, and killed soon after; says how it ended."""
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = running.wait(seconds)
        return "done" if code == 0 else f"FAILED with status {code}; its own message is above"
    except subprocess.TimeoutExpired:
        return f"out of time after {seconds:.0f} s; what it had measured is kept"
    finally:
        end_session(running)


def end_session(running: subprocess.Popen[bytes]) -> None:
    """SIGINT, then SIGKILL, to a process and all that it has started."""
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        if running.poll() is None:
            os.killpg(running.pid, number)
            try:
                running.wait(wait)
            except subprocess.TimeoutExpired:
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(TESTS, *PARTS), help="this one only, in this process, without the tests")
    parser.add_argument("--presets", nargs="+", default=[], help="of one part: these shapes only, e.g. llama_1b")
    parser.add_argument("--compiled-only", action="store_true", help="of throughput: without plain blocks and GaLore")
    parser.add_argument("--minutes", type=float, help="all that fits into so many, the most telling parts first")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick, to see that it runs"
    )
    parser.add_argument("--repeats", type=int, help="rounds of all variants; 5, with --minutes 3")
    parser.add_argument("--tests", choices=("yes", "no"), default="yes", help="tests/cuda first (on cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; does not touch RESULTS.md")
    options = parser.parse_args()
    options.repeats = options.repeats or (5 if options.minutes is None else 3)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu takes days at these shapes; write --quick --device cpu")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; write a number above 0, e.g. --minutes 8")
    if options.part is not None:
        try:
            sys.exit(run_part(options))
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
    tasks = EVERYTHING if options.minutes is None or options.quick else IN_A_HURRY
    untested = options.tests == "no" or options.device == "cpu"
    sys.exit(1 if run_all([task for task in tasks if not (untested and task.part == TESTS)], options) else 0)


if __name__ == "__main__":
    main()
