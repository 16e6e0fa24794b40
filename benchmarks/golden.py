"""Numbers of short runs of every kind, to the last bit: recorded on one machine, compared on the same one later.

    python benchmarks/golden.py --record golden.json      # before a change
    python benchmarks/golden.py --check golden.json       # after it; exit status 1 if any number differs
    python benchmarks/golden.py --check                   # against tests/golden.json (also a long test)

A file may hold recordings of several machines: the first, and under "also" the others (`--also` adds one). Each run is
compared with the one of this machine, if there is one.

Every scalar that a run writes is compared (losses, gradient norms, learning rates, what merges report), except times,
rates and memory. Another processor or another torch rounds otherwise: the file names both, and a check elsewhere says
that it proves nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, commit, hardware
from ranks import Job, warm_up

BASE = {
    "model.preset": "llama_nano",
    "data.seq_len": "32",
    "data.max_eval_sequences": "4",
    "loqt.rank": "32",
    "loqt.merge.gap": "3",
    "loqt.merge.schedule": "constant",
    "optim.lr": "5e-3",
    "train.steps": "10",
    "train.global_batch_size": "6",
    "train.micro_batch_size": "8",
    "train.device": "cpu",
    "train.progress": "off",
}
EXPERTS = {  # a config.json: three experts, which two ranks cut in the middle
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
MEASURED = ("perf/", "memory/")  # differ from run to run


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: what differs from `BASE`, on how many ranks, whether it goes on from a checkpoint, the model's config."""

    settings: dict[str, str]
    ranks: int = 1
    resumes: bool = False
    model: dict[str, Any] | None = None


def _spread(strategy: str, ranks: int, **more: str) -> Case:
    settings = {"parallel.strategy": strategy} | {key.replace("__", "."): value for key, value in more.items()}
    return Case(settings=settings, ranks=ranks)


CASES: dict[str, Case] = {
    "single": Case(settings={}),
    "single, several micro-batches": Case(settings={"train.micro_batch_size": "2"}),
    "single, full": Case(settings={"method": "full"}),
    "single, wide sketches": Case(settings={"loqt.subspace.oversampling": "1.0"}),
    "single, svd": Case(settings={"loqt.subspace.method": "svd"}),
    "single, randomized": Case(settings={"loqt.subspace.method": "randomized"}),
    "single, nf4_double": Case(
        settings={"loqt.quantization.weight": "nf4_double", "loqt.quantization.projection": "nf4_double"}
    ),
    "single, int8 states": Case(settings={"optim.states": "int8"}),
    "single, per_layer": Case(settings={"optim.per_layer": "true", "optim.clip_norm": "0"}),
    "single, bfloat16 factors": Case(settings={"model.dtype": "bfloat16", "model.trained_dtype": "bfloat16"}),
    "single, bfloat16": Case(settings={"model.dtype": "bfloat16", "train.micro_batch_size": "3"}),
    "single, offload all": Case(settings={"parallel.offload": "all"}),
    "single, paper's schedule, reset": Case(
        settings={"loqt.merge.schedule": "exponential", "loqt.merge.gap": "2", "loqt.merge.optimizer_state": "reset"}
    ),
    "single, resumed": Case(settings={}, resumes=True),
    "ddp x2": _spread("ddp", 2),
    "fsdp x2": _spread("fsdp", 2),
    "fsdp x2, several micro-batches": _spread("fsdp", 2, train__micro_batch_size="1"),
    "fsdp x2, int8 states, resumed": Case(
        settings={"parallel.strategy": "fsdp", "optim.states": "int8"}, ranks=2, resumes=True
    ),
    "fsdp x3": _spread("fsdp", 3),
    "zero 1 x2": _spread("zero", 2, parallel__zero_stage="1"),
    "zero 2 x2": _spread("zero", 2, parallel__zero_stage="2"),
    "zero 3 x2": _spread("zero", 2, parallel__zero_stage="3"),
    "experts": Case(settings={}, model=EXPERTS),
    "experts, zero 3 x2": Case(
        settings={"parallel.strategy": "zero", "parallel.zero_stage": "3"}, ranks=2, model=EXPERTS
    ),
}


def fingerprint() -> dict[str, str]:
    """What decides how numbers are rounded."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"hardware": hardware(), "capability": capability, "python": platform.python_version()}


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics without what is measured; floats as hexadecimal text, which is exact."""
    rows = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: _exact(value) for key, value in row.items() if _kept(key)} for row in rows]


def _kept(key: str) -> bool:
    return not key.startswith(MEASURED) and not key.endswith("seconds")


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def run(case: Case, folder: Path, text: Path) -> list[dict[str, Any]]:
    """Runs a case; what it has written.

    Raises:
        RuntimeError: It did not end well.
    """
    run_dir = folder / "run"
    settings = {**BASE, **case.settings, "train.run_dir": str(run_dir), "data.cache_dir": str(folder.parent / "cache")}
    if case.model is not None:
        settings |= {"model.path": str(_model_folder(folder, case.model)), "model.weights": "random"}
    words = ["train", f"--data.files={json.dumps([str(text)])}", *(f"--{k}={v}" for k, v in settings.items())]
    if case.resumes:
        _finish(Job([*words, "--checkpoint.every=4", "--checkpoint.keep_last=9"], folder / "first", ranks=case.ranks))
        words.append(f"--checkpoint.resume={folder / 'middle'}")
        (run_dir / "checkpoints" / "step-00000004").rename(folder / "middle")
        run_dir.rename(folder / "whole")
    _finish(Job(words, folder / "logs", ranks=case.ranks))
    return numbers(run_dir)


def _model_folder(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def _finish(job: Job) -> None:
    if any(job.wait(600)):
        raise RuntimeError(job.output()[-3000:])


def corpus(folder: Path) -> Path:
    """A text of real English, from the Python that runs this."""
    from pydoc_data.topics import topics

    path = folder / "topics.txt"
    path.write_text("\n\n".join(" ".join(text.split()) for text in sorted(topics.values())[:60]), encoding="utf-8")
    return path


def record(names: list[str]) -> dict[str, Any]:
    """The numbers of these cases, with what they were computed by."""
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        text = corpus(Path(name))
        for index, case in enumerate(names):
            began, folder = time.monotonic(), Path(name) / str(index)
            folder.mkdir()
            runs[case] = run(CASES[case], folder, text)
            print(f"{case:36} {len(runs[case])} rows, {time.monotonic() - began:.1f} s", flush=True)
    return {"commit": commit(), "machine": fingerprint(), "runs": runs}


def differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Where two runs' rows differ: `step key: old -> new`."""
    if [row["step"] for row in old] != [row["step"] for row in new]:
        return [f"steps {[row['step'] for row in old]} -> {[row['step'] for row in new]}"]
    found = []
    for before, after in zip(old, new, strict=True):
        keys = [key for key in before.keys() & after.keys() if before[key] != after[key]]
        found += [f"step {before['step']} {key}: {_shown(before[key])} -> {_shown(after[key])}" for key in sorted(keys)]
        found += [f"step {before['step']} {key} is gone" for key in sorted(before.keys() - after.keys())]
    return found


def _shown(value: Any) -> str:
    return repr(float.fromhex(value)) if isinstance(value, str) and "0x" in value else str(value)


def recordings(file: dict[str, Any]) -> list[dict[str, Any]]:
    """All that a file holds, one a machine."""
    return [file, *file.get("also", [])]


def compare(file: dict[str, Any], new: dict[str, Any]) -> int:
    """Prints what differs; how many cases do."""
    every = recordings(file)
    here = [old for old in every if old["machine"] == new["machine"]]
    if not here:
        print(f"NOT THE SAME MACHINE: {[old['machine'] for old in every]}, now {new['machine']}; rounding may differ")
    old = here[0] if here else file
    known = {name: rows for name, rows in new["runs"].items() if name in old["runs"]}
    differing = 0
    for name, rows in known.items():
        found = differences(old["runs"][name], rows)
        differing += bool(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        print(f"{'DIFFERS' if found else 'same   '} {name}" + (f": {found[0]}{more}" if found else ""))
    for name in new["runs"].keys() - known.keys():
        print(f"new     {name}: not recorded on this machine")
    print(f"{len(known) - differing} of {len(known)} runs are those of {old['commit']}, bit for bit")
    return differing


def add(path: Path, new: dict[str, Any]) -> None:
    """Puts runs beside those that a file has, under their machine; none that it has is changed."""
    file = json.loads(path.read_text())
    for old in recordings(file):
        if old["machine"] == new["machine"]:
            old["runs"] = {**new["runs"], **old["runs"]}
            break
    else:
        file.setdefault("also", []).append(new)
    path.write_text(json.dumps(file, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", type=Path, metavar="FILE")
    action.add_argument("--also", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE", nargs="?", const=ROOT / "tests" / "golden.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    warm_up()
    import loqt_scale

    print(f"{ROOT}, loqt_scale from {Path(loqt_scale.__file__).parent}")
    new = record([name for name in CASES if options.only in name])
    if options.record:
        options.record.write_text(json.dumps(new, indent=1) + "\n")
    elif options.also:
        add(options.also, new)
    elif compare(json.loads(options.check.read_text()), new):
        sys.exit(1)


if __name__ == "__main__":
    main()
