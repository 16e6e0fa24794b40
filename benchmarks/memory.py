"""What each method keeps in memory: measured at 60M, the planner's numbers beyond.

Measured: storages behind parameters, gradients and optimizer states, and the highest moment of a normal step and of a
merge step (`tests/distributed/footprint_tasks.py`), each in a process of its own. Computed: `loqt-scale plan`, whose
numbers the tests hold to measured ones (3% for state, 10% for peaks).

GaLore is not ours: its optimizer (galore-torch, if it is installed) gets the full-rank model's gradients.

    python benchmarks/memory.py
    python benchmarks/memory.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

import torch

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.plan import plan_run
from tests.distributed.footprint_tasks import (
    kinds_held,
    live_tensor_bytes,
    make_trainer,
    measured_peaks,
)
from tests.distributed.instruments import allocations
from tests.distributed.pool import RankPool

BF16 = ["--model.dtype=bfloat16"]
LEAN = ["--optim.states=int8", "--model.trained_dtype=bfloat16"]
PER_LAYER = ["--optim.per_layer=true", "--optim.clip_norm=0"]
DOUBLE = ["--loqt.quantization.weight=nf4_double", "--loqt.quantization.projection=nf4_double"]
METHODS: dict[str, list[str]] = {
    "full AdamW": ["--method=full"],
    "LoQT": [],
    "+ 8-bit states, bfloat16 factors": LEAN,
    "+ per-layer updates": [*LEAN, *PER_LAYER],
    "+ double quantization": [*LEAN, *PER_LAYER, *DOUBLE],
}
STATE = ("codes", "scales", "projection", "factor", "full_precision", "adam", "gradients")
LARGE = {"llama_1b": 512, "llama_7b": 1024, "llama_13b": 1024}


def measure_held(words: list[str]) -> dict[str, int]:
    """Bytes of each kind as the update finds them."""
    trainer = make_trainer(parse_run_config(words))
    trainer.step(0)
    trainer.accumulate(1)
    return kinds_held(trainer)


def measure_peaks(words: list[str]) -> dict[str, int]:
    """Highest moments."""
    return measured_peaks(parse_run_config(words))


def measure_galore(words: list[str], rank: int) -> dict[str, int]:
    """The full-rank model under GaLore's AdamW: bytes of each kind, and the highest moment of a normal step."""
    from galore_torch import GaLoreAdamW

    trainer = make_trainer(parse_run_config([*words, "--method=full"]))
    low_rank, rest = (group["params"] for group in trainer.optimizer.param_groups)
    galore = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": low_rank, **galore}, {"params": rest}], lr=1e-3)

    def step(index: int) -> None:
        trainer.accumulate(index)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    before = live_tensor_bytes()
    step(0)
    alive = live_tensor_bytes()
    with allocations() as made:
        step(1)
    del before
    trainer.accumulate(2)
    held = {"full_precision": sum(p.nbytes for p in trainer.parameters)}
    held["gradients"] = sum(p.grad.nbytes for p in trainer.parameters if p.grad is not None)
    held["adam"] = 0
    for state in optimizer.state.values():
        tensors = [state["exp_avg"], state["exp_avg_sq"]]
        if "projector" in state:
            tensors.append(state["projector"].ortho_matrix)
        held["adam"] += sum(tensor.nbytes for tensor in tensors)
    return {**held, "step": alive + made.kept + made.passing}


def measured_rows(preset: str, rank: int, folder: str) -> list[list[str]]:
    """One row a method."""
    fixed = ["--data.tokenizer=bytes", "--data.max_eval_sequences=2", "--train.progress=off", "--train.steps=20"]
    fixed += [f"--model.preset={preset}", f"--loqt.rank={rank}", "--loqt.merge.gap=2", *BF16, "--optim.lr=1e-3"]
    fixed += ["--train.global_batch_size=4", "--train.micro_batch_size=4", f"--train.run_dir={Path(folder) / 'run'}"]
    rows, first = [], 0
    results: dict[str, dict[str, int]] = {}
    for name, words in METHODS.items():
        found = []
        for task in ("measure_held", "measure_peaks"):
            pool = RankPool()
            found.append(pool.run(1, f"memory:{task}", words=[*fixed, "--parallel.strategy=single", *words])[0])
            pool.close()
        results[name] = {**found[0], **found[1]}
        if name == "full AdamW":
            if find_spec("galore_torch") is None:
                print("galore-torch is not installed: no row for it", flush=True)
                continue
            pool = RankPool()
            words = [*fixed, "--parallel.strategy=single"]
            results["GaLore"] = pool.run(1, "memory:measure_galore", words=words, rank=rank)[0]
            pool.close()
    for name, result in results.items():
        state = sum(result.get(kind, 0) for kind in STATE)
        peak = max(result.get("step", 0), result.get("merge", 0))
        first = first or state
        kinds = [
            sum(result.get(kind, 0) for kind in kinds) for kinds in (STATE[:3], STATE[3:5], ["adam"], ["gradients"])
        ]
        rows.append([name, *(_mebibytes(size) for size in (*kinds, state, peak)), f"{state / first:.3f}"])
    return rows


def computed_rows() -> list[list[str]]:
    """One row a method and model, from the planner."""
    rows = []
    for preset, rank in LARGE.items():
        first = 0
        for name, words in METHODS.items():
            common = [f"--model.preset={preset}", f"--loqt.rank={rank}", *BF16, "--model.activation_checkpointing=true"]
            common += ["--train.global_batch_size=4", "--train.micro_batch_size=4", "--parallel.strategy=single"]
            memory = plan_run(parse_run_config([*common, *words]), ranks=1, vocab_size=32128).memory
            state = memory.held + memory.gradients
            first = first or state
            rows.append([preset, name, f"{state / 2**30:.2f}", f"{memory.peak / 2**30:.2f}", f"{state / first:.3f}"])
            print(rows[-1], flush=True)
    return rows


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}" if size else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    preset, rank = ("llama_micro", 32) if options.quick else ("llama_60m", 128)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured_rows(preset, rank, folder)
    header = ["measured, MiB", "W, scales, P", "B and the rest", "moments", "gradients", "all", "peak", "all / full"]
    text = (
        f"{table(header, rows)}\n\n{preset}, rank {rank}, byte vocabulary (320), bfloat16 compute, 4 sequences of 256 "
        "tokens, one process. `peak`: of a normal step and of a merge step, activations included. GaLore's peak is a "
        "normal step's."
    )
    if not options.quick:
        large = table(["computed, GiB", "method", "state and gradients", "peak", "state / full"], computed_rows())
        text += (
            f"\n\n{large}\n\n**Computed** by `loqt-scale plan`, not measured: one rank, 4 sequences of 256 tokens, "
            "blocks recomputed, vocabulary 32128, ranks 512 (1b) and 1024. 800 MiB of a GPU that torch does not count "
            "are not in these."
        )
    publish("Memory of each method", "python benchmarks/memory.py", text, keep=not options.quick)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
