"""What a checkpoint costs: LoQT beside full-rank training of the same model, and an export beside the model's size.

One process. Both methods' trainers live side by side and take turns, A B A B; every number of the first table is the
median over the turns. A save is `checkpoint.background: false`'s; the pause is what training waits for under `true`.

    python benchmarks/checkpoints.py                          # some minutes on two cores
    python benchmarks/checkpoints.py --preset llama_micro --turns 2   # to see that it runs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.checkpoint import CheckpointSaver, open_checkpoint, read_manifest
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.training.restart import restore
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer, update_without_merge

METHODS = ("loqt", "full")
MIB = 2**20

# Samples this process's own memory (no file pages) while it exports; prints start, peak.
EXPORTER = """
import sys, threading, time
from loqt_scale.export import export_checkpoint

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

start, peak, done = anonymous(), [0], threading.Event()
def sample():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=sample)
thread.start()
began = time.perf_counter()
export_checkpoint(sys.argv[1], sys.argv[2], dtype="float32", max_shard_size=sys.argv[3])
seconds = time.perf_counter() - began
done.set(); thread.join()
print(start, peak[0], seconds)
"""


def trainer_of(method: str, folder: Path, arguments: list[str]) -> Trainer:
    """A trainer that has applied one update, so that Adam has moments."""
    fixed = ["--data.tokenizer=bytes", "--data.seq_len=64", "--data.max_eval_sequences=2", "--train.progress=off"]
    small = ["--train.global_batch_size=1", "--train.micro_batch_size=1", f"--train.run_dir={folder / method}"]
    trainer = make_trainer(parse_run_config([*fixed, *small, f"--method={method}", *arguments]))
    update_without_merge(trainer, 1)
    trainer.done, trainer.updates, trainer.eval_before = 2, 1, 0.0
    return trainer


def saver_of(trainer: Trainer, *, background: bool) -> CheckpointSaver:
    config = replace(trainer.config.checkpoint, background=background, keep_last=1)
    root = Path(trainer.config.train.run_dir) / "checkpoints"
    return CheckpointSaver(root, config, trainer.strategy.editing, tell=lambda line: sys.exit(line))


def turn(trainer: Trainer) -> dict[str, float]:
    """Seconds of one save, one pause, and one restore."""
    trainer.saver = saver_of(trainer, background=False)
    began = time.perf_counter()
    trainer.save()
    seconds = {"save": time.perf_counter() - began}
    trainer.saver = saver_of(trainer, background=True)
    began = time.perf_counter()
    trainer.save()
    seconds["pause"] = time.perf_counter() - began
    trainer.saver.wait()
    (path,) = (Path(trainer.config.train.run_dir) / "checkpoints").glob("step-*")
    began = time.perf_counter()
    restore(trainer, open_checkpoint(path, trainer.strategy.comm))
    seconds["restore"] = time.perf_counter() - began
    return seconds


def sizes(trainer: Trainer) -> dict[str, float]:
    """MiB of what a checkpoint holds, by kind."""
    (path,) = (Path(trainer.config.train.run_dir) / "checkpoints").glob("step-*")
    kinds = {"model": 0.0, "moments": 0.0}
    for name, (shape, dtype) in read_manifest(path).tensors.items():
        kinds[name.partition(".")[0]] += prod(shape) * (1 if dtype == "uint8" else 4) / MIB
    return kinds | {"files": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MIB}


def export_rows(run_dir: Path, folder: Path) -> list[list[str]]:
    rows = []
    for size in ("20MB", "100MB", "10GB"):
        out = folder / f"export-{size}"
        words = [sys.executable, "-c", EXPORTER, str(run_dir), str(out), size]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
        start, peak, seconds = map(float, done.stdout.split()[-3:])
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        files = len(list(out.glob("*.safetensors")))
        rows.append([size, str(files), f"{written / MIB:.0f}", f"{(peak - start) / MIB:.0f}", f"{seconds:.1f}"])
        rows[-1].append(f"{(peak - start) / written:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_130m")
    parser.add_argument("--rank", type=int, default=None, help="default: the shape's, a third of its width at most")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    rank = options.rank or {"llama_micro": 32, "llama_60m": 128, "llama_130m": 256}[options.preset]
    arguments = [f"--model.preset={options.preset}", f"--loqt.rank={rank}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainers = {method: trainer_of(method, folder, arguments) for method in METHODS}
        measured: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(options.turns):
            for method, trainer in trainers.items():
                measured[method].append(turn(trainer))
        size = {method: sizes(trainer) for method, trainer in trainers.items()}
        rows = []
        for key, label in (("model", "parameters"), ("moments", "Adam moments"), ("files", "**files**")):
            values = [size[method][key] for method in METHODS]
            rows.append([f"{label}, MiB", *(f"{value:.1f}" for value in values), f"{values[0] / values[1]:.3f}"])
        for key, label in (("save", "save, s"), ("pause", "pause of a background save, s"), ("restore", "restore, s")):
            values = [median(seconds[key] for seconds in measured[method]) for method in METHODS]
            ratios = sorted(a[key] / b[key] for a, b in zip(measured["loqt"], measured["full"], strict=True))
            ratio = f"**{median(ratios):.3f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            rows.append([label, *(f"{value:.3f}" for value in values), ratio])
        share = [median(s["pause"] / s["save"] for s in measured[method]) for method in METHODS]
        rows.append(["pause / save", *(f"{value:.3f}" for value in share), ""])
        exports = export_rows(folder / "loqt", folder)
    text = table([options.preset + f", rank {rank}", *METHODS, "loqt / full"], rows)
    text += (
        f"\n\nOne process, {options.turns} alternating turns; a save and a restore include checksums of all files.\n\n"
    )
    text += table(
        [
            "export, max_shard_size",
            "files",
            "written, MiB",
            "peak memory beyond start, MiB",
            "seconds",
            "peak / written",
        ],
        exports,
    )
    text += "\n\nMemory is the process's own (RssAnon, sampled every 2 ms), float32 export of the LoQT run."
    given = " ".join(sys.argv[1:])
    publish("Checkpoints", f"python benchmarks/checkpoints.py {given}".strip(), text)


if __name__ == "__main__":
    main()
