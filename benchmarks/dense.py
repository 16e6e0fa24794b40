"""What going back to ordinary weights costs: the highest resident size above what the converted model held, and time.

Each case is a process of its own, on the CPU. Linux only: the kernel's highest resident size is set back before the
call.

    python benchmarks/dense.py                # about 200 MB of dense weights
    python benchmarks/dense.py --quick        # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, publish, table
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))

from loqt_scale import LoQTConfig, convert_to_loqt, save_merged, to_dense

Act = Callable[[LlamaForCausalLM, Path], object]
WAYS: dict[str, Act] = {
    "to_dense(model)": lambda model, _: to_dense(model),
    "to_dense(model, dtype=torch.bfloat16)": lambda model, _: to_dense(model, dtype=torch.bfloat16),
    "save_merged(model, folder)": lambda model, folder: save_merged(model, folder),
    'save_merged(..., max_shard_size="20MB")': lambda model, folder: save_merged(model, folder, max_shard_size="20MB"),
    "save_merged(..., dtype=torch.bfloat16)": lambda model, folder: save_merged(model, folder, dtype=torch.bfloat16),
    "model.save_pretrained(folder)": lambda model, folder: model.save_pretrained(folder),
    "to_dense(model).save_pretrained(folder)": lambda model, folder: to_dense(model).save_pretrained(folder),
}
SIZES = {"vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 9}
QUICK = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADER = ["line", "peak above the converted model, of the dense weights' bytes", "seconds"]


def resident(key: str) -> int:
    """A number of this process's memory in bytes: VmRSS now, VmHWM at most."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key))
    return int(line.split()[1]) * 1024


def measure(way: str, *, quick: bool) -> dict[str, float]:
    """Bytes of the dense and the converted model, the peak above the latter, and seconds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4 if quick else 10, **(QUICK if quick else SIZES)))
    dense = sum(p.nbytes for p in model.parameters())
    convert_to_loqt(model, LoQTConfig(rank=16 if quick else 128))
    packed = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held, began = resident("VmRSS"), time.perf_counter()
        made = WAYS[way](model, Path(folder) / "model")
        seconds = time.perf_counter() - began
        del made
        return {"dense": dense, "packed": packed, "peak": resident("VmHWM") - held, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options.way, quick=options.quick)))
        return
    rows, quick = [], ["--quick"] if options.quick else []
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *quick]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([f"`{way}`", f"**{found['peak'] / found['dense']:.2f}**", f"{found['seconds']:.2f}"])
        print(rows[-1], flush=True)
    text = (
        f"{table(HEADER, rows)}\n\nA Llama of {found['dense'] / 1e6:.0f} MB of dense float32 weights, "
        f"{found['packed'] / 1e6:.0f} MB converted, which stay; one process a line, one thread."
    )
    publish("Back to ordinary weights: memory", "python benchmarks/dense.py", text, keep=not options.quick)


if __name__ == "__main__":
    main()
