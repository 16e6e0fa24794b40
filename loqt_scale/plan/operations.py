"""What the operators of a pass do: FLOPs, bytes of device memory, kernels; counted as they run on fake tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loqt_scale.functional.operator_flops import operator_flops

Kind = Literal["product", "attention", "dequantize", "other"]


@dataclass(frozen=True)
class Operation:
    """Calls of operators that cost the same.

    Args:
        kind: What their speed depends on.
        flops: Of one call.
        read: Bytes that one call reads: each input once.
        written: Bytes that it writes.
    """

    kind: Kind
    flops: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


Operations = Counter[Operation]


class OperationMeter(TorchDispatchMode):
    """Counts every operator inside its `with` block that starts a kernel: no views, no mere allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        if _starts_a_kernel(func, inputs, outputs):
            flops = operator_flops(func._overloadpacket, args, kwargs or {}, result)
            read, written = _bytes(inputs), _bytes(outputs)
            self.operations[Operation(_kind(func, flops), flops, read, written)] += 1
        return result


def extrapolated(shallow: Operations, deep: Operations, *, blocks: tuple[int, int], depth: int) -> Operations:
    """Operations of a model of `depth` blocks, from those of two with few: each block adds the same."""
    counts = Counter(deep)
    for operation in shallow.keys() | deep.keys():
        added = deep[operation] - shallow[operation]
        counts[operation] += (depth - blocks[1]) * added // (blocks[1] - blocks[0])
    return Counter({operation: count for operation, count in counts.items() if count > 0})


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _starts_a_kernel(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if not outputs or "empty" in str(func._overloadpacket):
        return False
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in known for tensor in outputs)


def _kind(func: Any, flops: int) -> Kind:
    name = str(func.name())
    if "attention" in name:
        return "attention"
    if flops:
        return "product"
    return "dequantize" if "dequantize" in name else "other"


def _bytes(tensors: list[Tensor]) -> int:
    """Each storage once, and of an expanded tensor what there is of it."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        size = min(tensor.numel() * tensor.itemsize, storage.nbytes())
        sizes[storage._cdata] = max(size, sizes.get(storage._cdata, 0))
    return sum(sizes.values())
