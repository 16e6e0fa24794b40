"""The streamed update, operator by operator and compiled into one kernel a chunk (`optim.compile`).

Times alternate A B B A on one thread. Operators are those that torch starts (views are none), for a whole update and
for each parameter of one chunk in it; on a GPU each is a kernel.

    python benchmarks/updates.py              # 2^22 values
    python benchmarks/updates.py --quick      # 2^16, to see that it runs; does not touch RESULTS.md

With `--triton` nothing is timed. torch.compile writes the kernels that a GPU would get, in Triton; they are counted,
run in Triton's interpreter on the CPU, and their bits compared with those of the operators. It needs `pip install
triton`.

    python benchmarks/updates.py --triton
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

if "--triton" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from common import publish, table
from step_time import measured_in_turns
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loqt_scale.optim import RowShards, StreamedAdamW, StreamedMuon, step_if_finite
from loqt_scale.optim.fragment import CHUNK_VALUES

COLUMNS = 256
HEADER = [
    "weights and states",
    "optimizer",
    "operators, an update",
    "and a parameter",
    "compiled",
    "ms",
    "compiled, ms",
    "/ before",
    "/ torch's fused AdamW, before",
    "compiled",
]
NOTE = (
    "One parameter of {rows} x {columns} values, weight decay, a step that is skipped if the norm is not finite, one "
    "thread, {repeats} rounds in turns, medians. Operators: of an update with its counts, rates and seeds, and of each "
    "parameter of one chunk; what is compiled is one (Muon: two, before and after its Gram matrix). torch's fused "
    "AdamW: float32 weights and states."
)
TRITON_HEADER = ["weights and states", "optimizer", "norm", "kernels of an update", "values", "that differ"]
TRITON_NOTE = (
    "Triton that torch.compile writes, run in Triton's interpreter: two steps of one parameter of {rows} x {columns}, "
    "a chunk. Not counted: counts, rates and seeds, of all parameters together, and Muon's Gram matrices. `norm`: of "
    "the gradient, which decides on the device whether the step is skipped. `values`: weights, codes, scales; none may "
    "differ from what the operators give one by one."
)


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    muon: bool
    dtype: torch.dtype
    states: str

    @property
    def optimizer(self) -> str:
        return "Muon" if self.muon else "AdamW"


KINDS = [
    Kind("float32", False, torch.float32, "float32"),
    Kind("float32, int8 states", False, torch.float32, "int8"),
    Kind("bfloat16, int8 states", False, torch.bfloat16, "int8"),
    Kind("float32", True, torch.float32, "float32"),
    Kind("bfloat16, int8 states", True, torch.bfloat16, "int8"),
]


class Operators(TorchDispatchMode):
    """Counts what torch starts; not views, and not the reading of a number."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "_local_scalar_dense" in str(func))
        return func(*args, **(kwargs or {}))


def parameter_of(kind: Kind, values: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(values // COLUMNS, COLUMNS, generator=generator).to(kind.dtype))
    parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(kind.dtype)
    return parameter


def optimizer_of(kind: Kind, parameters: list[nn.Parameter], *, compiled: bool) -> StreamedAdamW:
    adam: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "states": kind.states}
    rows: dict[str, Any] = {"local": lambda t: t, "first_row": lambda _: 0, "seed": 0, "compiled": compiled}
    group = {"params": parameters, "lr": 1e-3, "muon": kind.muon}
    if kind.muon:
        return StreamedMuon([group], momentum=0.9, shards=RowShards(), **adam, **rows)
    return StreamedAdamW([group], **adam, **rows)


def seconds_of(update: Callable[[], None]) -> float:
    began = time.perf_counter()
    update()
    return time.perf_counter() - began


def guarded(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step that is skipped if the norm is not finite, as a run's is."""
    return partial(step_if_finite, optimizer, torch.ones(()))


def operators_of(kind: Kind) -> tuple[int, int, int]:
    """(of an update, of each parameter in it, of which what is compiled)."""
    one, chunks, parameters = (_count(kind, *shape) for shape in ((1, 1), (1, 2), (2, 1)))
    seeds = int(kind.dtype == torch.bfloat16)  # each chunk but the first moves its seed on
    return 2 * one - parameters, parameters - one, chunks - one - seeds


def _count(kind: Kind, parameters: int, chunks: int) -> int:
    """Operators of an update of so many parameters."""
    held = [parameter_of(kind, chunks * CHUNK_VALUES) for _ in range(parameters)]
    optimizer = optimizer_of(kind, held, compiled=False)
    guarded(optimizer)()
    with Operators() as counted:
        guarded(optimizer)()
    return counted.count


def measure(kind: Kind, values: int, repeats: int) -> list[object]:
    """A row."""
    variants: dict[str, Callable[[], None]] = {}
    for name in ("before", "compiled"):
        variants[name] = guarded(optimizer_of(kind, [parameter_of(kind, values)], compiled=name == "compiled"))
    plain = parameter_of(KINDS[0], values)
    variants["torch"] = guarded(torch.optim.AdamW([plain], fused=True))
    for update in variants.values():
        update()
        update()
    times = measured_in_turns(list(variants), repeats, lambda name, turn: seconds_of(variants[name]))
    before, compiled, torchs = (statistics.median(times[name]) for name in variants)
    whole, parameter, chunk = operators_of(kind)
    rest = parameter - chunk + (2 if kind.muon else 1)
    row: list[object] = [kind.name, kind.optimizer, whole, parameter, rest, f"{1000 * before:.1f}"]
    row += [f"{1000 * compiled:.1f}", f"**{compiled / before:.2f}**"]
    return [*row, f"{before / torchs:.1f}", f"**{compiled / torchs:.1f}**"]


def triton_rows(values: int) -> list[list[object]]:
    """Counted kernels and compared bits of every kind, with and without a guard; see `triton_interpreter`."""
    from triton_interpreter import interpreted

    rows: list[list[object]] = []
    for kind in KINDS:
        for guard in (None, 1.0, math.nan):
            found, kernels = _stepped(kind, values, guard, interpreted())
            with torch.compiler.set_stance("force_eager"):
                expected, _ = _stepped(kind, values, guard, [])
            differ = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
            said = {None: "none", 1.0: "finite"}.get(guard, "not finite")
            seen = sum(map(torch.numel, found))
            rows.append([kind.name, kind.optimizer, said, kernels, seen, differ])
            print(rows[-1], flush=True)
    return rows


def _stepped(kind: Kind, values: int, norm: float | None, ran: list[str]) -> tuple[list[Tensor], int]:
    """What two steps leave, and the kernels of the second."""
    parameter = parameter_of(kind, values)
    optimizer = optimizer_of(kind, [parameter], compiled=True)
    for _ in range(2):
        ran.clear()
        if norm is None:
            optimizer.step()
        else:
            step_if_finite(optimizer, torch.tensor(norm))
    state = optimizer.state[parameter]
    kept = [t for name in ("exp_avg", "exp_avg_sq") if name in state for t in state[name].tensors()]
    return [parameter.detach(), *kept], len(ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few values; does not touch RESULTS.md")
    parser.add_argument("--triton", action="store_true", help="count and run the kernels of a GPU, in the interpreter")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep, values = not options.quick, 2**16 if options.quick else 2**22
    if options.triton:
        values = 2**11 if options.quick else 2**13
        rows, header = triton_rows(values), TRITON_HEADER
        title, command, note = (
            "Streamed updates as a GPU's kernels",
            "python benchmarks/updates.py --triton",
            TRITON_NOTE,
        )
    else:
        rows, header = [measure(kind, values, options.repeats) for kind in KINDS], HEADER
        title, command, note = "Streamed updates, compiled and not", "python benchmarks/updates.py", NOTE
    text = note.format(rows=values // COLUMNS, columns=COLUMNS, repeats=options.repeats)
    publish(title, command, f"{table(header, rows)}\n\n{text}", keep=keep)


if __name__ == "__main__":
    main()
