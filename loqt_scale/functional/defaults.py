"""Work that does not depend on torch's global defaults, which belong to the program that calls us.

`torch.set_default_dtype` and `torch.set_default_device` change what every tensor is that is made without naming either,
in libraries too: bitsandbytes' tables of levels would be rounded to bfloat16, and we keep them for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Context in which new tensors are float32 on the CPU, unless they say something else; the old defaults return.

    The default dtype is the whole process's: other threads see it change.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as after:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            after.callback(torch.set_default_dtype, dtype)
        if device.type != "cpu":
            after.enter_context(torch.device("cpu"))
        yield
