"""Sums of a product that are rounded once, in eager and in compiled code, to the same bits.

torch's kernels for `lerp`, `addcmul` and `sub(alpha=)` take the processor's fused multiply-add, which rounds a b + c
once. torch.compile writes the same operators as a product and a sum, each rounded, unless the code asks for the fused
one. So these functions ask for it where they are compiled, and elsewhere are torch's own operators.

A CPU's `sqrt` of float32 is that of a maths library, which is not rounded correctly; that of compiled code is. So is
`exact_root`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lerp(start: Tensor, end: Tensor, weight: float, *, out: Tensor) -> Tensor:
    """start + weight (end - start), written to `out`.

    Args:
        start: float32.
        end: float32, of its shape.
        weight: In [0, 1].
        out: float32, of its shape; may be `start`.
    """
    if not torch.compiler.is_compiling():
        return torch.lerp(start, end, weight, out=out)
    apart = end - start
    if weight < 0.5:  # as torch's kernel, which comes to `end` exactly at 1
        return out.copy_(_fma(torch.full_like(apart, weight), apart, start))
    return out.copy_(_fma(-apart, 1.0 - torch.full_like(apart, weight), end))


def add_square_(start: Tensor, root: Tensor, weight: float) -> Tensor:
    """start + weight root^2, written to `start`. float32, of one shape."""
    if not torch.compiler.is_compiling():
        return start.addcmul_(root, root, value=weight)
    return start.copy_(_fma(root * weight, root, start))


def subtract_scaled_(start: Tensor, values: Tensor, scale: float | Tensor) -> Tensor:
    """start - scale values, written to `start`.

    Args:
        start: float32.
        values: float32, of its shape.
        scale: A number, or one in a scalar tensor, which compiled code does not take for a constant.
    """
    if not isinstance(scale, Tensor):
        return start.sub_(values, alpha=scale)
    if not torch.compiler.is_compiling():
        return start.addcmul_(values, scale, value=-1.0)
    return start.copy_(_fma(-values, scale.float().expand_as(values), start))


def exact_root(values: Tensor) -> Tensor:
    """Square roots of float32 values, correctly rounded."""
    return values.sqrt() if torch.compiler.is_compiling() else values.double().sqrt().float()


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, rounded once; for compiled code (eager it rounds twice)."""
    from torch._inductor import inductor_prims  # late: it imports the compiler

    found: Tensor = inductor_prims.fma(a, b, c)
    return found
