"""Everything that wants a GPU, in one command: the tests of tests/cuda, then all tables.

    python benchmarks/gpu.py                          # tests, then all parts; half an hour on an H100
    python benchmarks/gpu.py --part memory            # one part, no tests
    python benchmarks/gpu.py --tests no               # all parts, no tests
    python benchmarks/gpu.py --quick --device cpu     # every part on tiny shapes, to see that it runs; keeps nothing

    part        what it measures                                                       expected on one H100
    throughput  tokens/s of full-rank AdamW, LoQT, GaLore; plain and compiled          8 min (half of it compiles)
    merge       seconds of a merge over those of a step; its parts                     4 min
    memory      peaks of every method at 1b and 7b; 13b under a cap of 24 GB           8 min
    profile     where a step's time goes, the most that a fused kernel could save      2 min
    offload     step times with what waits in host memory                              3 min

(Expected, not measured: no GPU was at hand when this was written.) On a card of less than 80 GB, what does not fit is
left out or said not to fit. Each part runs in a process of its own, so one that fails takes no other down; the exit
status then is not 0. Tables go to RESULTS.md. What they are to be held against: docs/performance.md, "On a GPU".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, publish

sys.path.insert(0, str(ROOT))

PARTS = ("throughput", "merge", "memory", "profile", "offload")


def run_part(name: str, options: argparse.Namespace) -> None:
    """Measures one part in this process, and publishes its table."""
    import gpu_memory
    import gpu_profile
    import gpu_speed
    import torch
    from gpu_common import Place

    from loqt_scale.strategies import resolve_device

    parts = {
        "throughput": gpu_speed.throughput,
        "merge": gpu_speed.merge,
        "memory": gpu_memory.memory,
        "profile": gpu_profile.profile,
        "offload": gpu_speed.offload,
    }
    device = resolve_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device, options.quick, Path(folder))
        title, text = parts[name](place, 2 if options.quick else options.repeats)
    publish(title, f"python benchmarks/gpu.py --part {name}", text, keep=place.cuda and not options.quick)


def run_all(options: argparse.Namespace) -> int:
    """Tests, then each part in a process of its own; returns how many failed."""
    tests = options.tests == "yes" and options.device == "cuda"
    commands = {"tests": [sys.executable, "-m", "pytest", "-q", "tests/cuda"]} if tests else {}
    given = [f"--device={options.device}", f"--repeats={options.repeats}", *(["--quick"] if options.quick else [])]
    commands |= {name: [sys.executable, str(Path(__file__)), f"--part={name}", *given] for name in PARTS}
    outcomes = {}
    for name, command in commands.items():
        print(f"\n==== {name} ====", flush=True)
        started = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        outcomes[name] = code
        how = "done" if code == 0 else f"FAILED with status {code}; its own message is above"
        print(f"---- {name}: {how}, {(time.perf_counter() - started) / 60:.1f} min", flush=True)
    failed = [name for name, code in outcomes.items() if code]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall done", flush=True)
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this one only, in this process, without the tests")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick, to see that it runs"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all variants")
    parser.add_argument("--tests", choices=("yes", "no"), default="yes", help="tests/cuda first (on cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; does not touch RESULTS.md")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu takes days at these shapes; write --quick --device cpu")
    if options.part is None:
        sys.exit(1 if run_all(options) else 0)
    run_part(options.part, options)


if __name__ == "__main__":
    main()
