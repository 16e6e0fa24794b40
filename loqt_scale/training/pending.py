"""A step's numbers on their way to the host, which reads them a step later.

Reading a number of the device at once would make the host wait until the step is done, and the device wait for the host
to launch the next one. So a step ends by starting a copy; while the next step runs, the copy is there and costs no
waiting. What must be known at once (before a merge, a checkpoint, an evaluation) is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.training.agreement import StepTag


class HostCopy:
    """A copy of a small tensor to the host that does not hold up who starts it.

    Args:
        tensor: What to copy; it must not change any more.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """The numbers; waits for them if they are not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._host.tolist()]


@dataclass(frozen=True)
class PendingStep:
    """A step that the device has been told to do.

    Args:
        tag: Which one it is.
        numbers: (4,): sums over ranks of the loss, the tags' checksums and the flags' numbers; the gradient's norm.
        metrics: What the host knows of it already.
    """

    tag: StepTag
    numbers: HostCopy
    metrics: dict[str, float]
