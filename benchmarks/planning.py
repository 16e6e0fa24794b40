"""What `loqt-scale plan` says of 7b and 13b on four machines, beside full-rank training. Nothing is measured.

python benchmarks/planning.py
python benchmarks/planning.py --presets llama_7b
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.config import RunConfig
from loqt_scale.config.sizes import OUTSIDE
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.plan import Machine, Plan, find_machine, plan_run
from loqt_scale.plan.advice import first_that_fits
from loqt_scale.plan.speed_table import full_rank

# (GPU, how many, parallel.shard_size)
MACHINES = (("RTX4090", 1, None), ("RTX4090", 8, None), ("H100", 8, None), ("H100", 64, None), ("H100", 64, 8))
VOCABULARY = 32128
HEADER = ["model", "machine", "method", "settings beyond the config", "peak, GiB", "a step, s", "bound by"]
HEADER += ["merges", "tokens/s", "MFU", "days to 20 G tokens"]


def rows_of(preset: str, gpu: str, gpus: int, shard_size: int | None) -> Iterator[list[str]]:
    """LoQT, with the least that makes it fit, and full-rank training of the same batch in the passes that fit."""
    config = parse_run_config([f"--config={ROOT / 'configs' / f'{preset}.yaml'}", "--model.compile=true"])
    config = replace(config, parallel=replace(config.parallel, shard_size=shard_size))
    on = find_machine(gpu, gpus=gpus)
    for name, wanted in (("LoQT", config), ("full rank", full_rank(config, gpus))):
        settled, words = fitting(wanted, on, gpus, whole=name == "LoQT")
        place = f"{gpus} x {gpu} ({on.gpu.memory:g} GB)"
        if shard_size is not None:
            place += f", shard_size {shard_size}"
        if settled is None:
            yield [preset, place, name, "does not fit", *["-"] * (len(HEADER) - 4)]
        else:
            plan = plan_run(settled, ranks=gpus, vocab_size=VOCABULARY, on=on)
            yield [preset, place, name, words, *numbers(plan)]


def fitting(config: RunConfig, on: Machine, gpus: int, *, whole: bool) -> tuple[RunConfig | None, str]:
    """The run with what makes it fit; of full-rank training smaller passes and sharded gradients are tried."""
    limit = on.gpu.memory * 1e9 - OUTSIDE

    def fits(one: RunConfig) -> bool:
        return plan_run(one, ranks=gpus, vocab_size=VOCABULARY).memory.peak <= limit

    if fits(config):
        return config, "-"
    if whole:
        change = first_that_fits(config, ranks=gpus, fits=fits)
        words = "" if change is None else " ".join(word.removeprefix("--") for word in change.words)
        return (None, "") if change is None else (change.config, words)
    sharded = replace(config, parallel=replace(config.parallel, kept_between_passes="nothing"))
    said = "parallel.kept_between_passes=nothing"
    for kept, words in ((config, ""), (sharded, said)) if gpus > 1 else ((config, ""),):
        for size in (config.train.micro_batch_size, 4, 2, 1):
            smaller = replace(kept, train=replace(kept.train, micro_batch_size=size))
            if size <= config.train.micro_batch_size and fits(smaller):
                return smaller, f"{words} train.micro_batch_size={size}".strip()
    return None, ""


def numbers(plan: Plan) -> list[str]:
    """A row's figures."""
    speed = plan.speed
    assert speed is not None
    merges = f"{speed.merges * speed.merge / speed.seconds:.1%}" if speed.merges else "-"
    days = 20e9 / speed.tokens_per_second / 86400
    row = [f"{plan.memory.peak / 2**30:.1f}", f"{speed.step:.2f}", speed.bound, merges]
    return [*row, f"{speed.tokens_per_second:,.0f}", f"{speed.mfu:.1%}", f"{days:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["llama_7b", "llama_13b"])
    options = parser.parse_args()
    rows = [row for preset in options.presets for machine in MACHINES for row in rows_of(preset, *machine)]
    text = (
        f"{table(HEADER, rows)}\n\n**Planned, not measured.** The configs of these names with `model.compile: true`; a "
        "step is 131072 tokens where no other batch is written. Vocabulary 32128. Full rank: AdamW, FSDP2 on several "
        "GPUs, passes of fewer sequences, and then gradients sharded between passes, where that makes it fit. "
        "Assumptions: `loqt_scale/devices.yaml`."
    )
    publish("Planned: 7b and 13b on four machines", "python benchmarks/planning.py", text)


if __name__ == "__main__":
    main()
