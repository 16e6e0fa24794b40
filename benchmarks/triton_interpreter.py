"""Part of benchmarks/updates.py: torch.compile's Triton kernels without a GPU, in Triton's interpreter.

torch can be told to write Triton for tensors on a CPU, for a backend that Triton's wheel does not have. Its source is
what a GPU would get; here it is given to the interpreter, which runs it in numpy. What is replaced is all that would
compile and launch it. TRITON_INTERPRET=1 must be in the environment before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch.utils import _triton

from loqt_scale.optim import chunk_updates

BLOCKS = {"R0_BLOCK": 256}
ROWS, FLAT = 4, 256  # of a program: rows with a reduction, values without


@cache
def interpreted() -> list[str]:
    """From now on torch.compile's Triton runs in the interpreter; the list gets the name of each kernel that does."""
    ran: list[str] = []
    config.cpu_backend = "triton"
    for name in ("reduction", "persistent_reduction", "pointwise"):
        setattr(triton_heuristics, name, lambda *args, **kwargs: lambda function: function)
    triton_helpers.set_driver_to_cpu = lambda: None
    _triton.triton_hash_with_backend = lambda: "interpreter"
    AsyncCompile.triton = lambda self, name, source, device_str="cpu": Kernel(name, source, ran)  # type: ignore[method-assign]
    compiled, options = torch.compile, dict(chunk_updates._ROUNDED_AS_IN_EAGER)
    chunk_updates.in_one_kernel.cache_clear()
    torch.compile = lambda function, **kwargs: compiled(function, **{**kwargs, "options": options})  # type: ignore[assignment]
    return ran


class Kernel:
    """One kernel, as torch's wrapper code calls it."""

    def __init__(self, name: str, source: str, ran: list[str]) -> None:
        path = Path(tempfile.mkdtemp()) / "kernel.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._name, self._ran, self._function = name, ran, getattr(module, name)
        self._parameters = list(inspect.signature(self._function.fn).parameters)

    def run(self, *args: Any, stream: Any = None, **_: Any) -> None:
        """Launches it over all programs."""
        given = args[: sum(not name.isupper() for name in self._parameters)]
        reduces = "r0_numel" in self._parameters
        blocks = {"XBLOCK": ROWS if reduces else FLAT, **(BLOCKS if "R0_BLOCK" in self._parameters else {})}
        programs = math.ceil(given[self._parameters.index("xnumel")] / blocks["XBLOCK"])
        self._ran.append(self._name)
        self._function[(programs,)](*given, **blocks)
