"""What an update does to one chunk of a parameter: pure arithmetic on tensors that are replaced in place.

    adamw        weights and both moments from the gradient
    accelerate   Muon's momentum from the gradient, and what of it is made orthogonal
    descend      weights from Muon's orthogonal step

Each runs as it stands, operator by operator, some forty passes over a chunk; or compiled (`in_one_kernel`), and then
reads a value's weight, gradient and moments at most twice and writes them once. The bits are the same if both take
`exact` roots (see `functional.fused_multiply_add`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loqt_scale.errors import explained
from loqt_scale.functional.fused_multiply_add import add_square_, exact_root, lerp, subtract_scaled_
from loqt_scale.functional.rounding import stochastic_bfloat16
from loqt_scale.optim.fragment import Stored, replace_unless

Update = Callable[..., None]
_ROUNDED_AS_IN_EAGER: dict[str, Any] = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
"""Of a GPU's kernels; those of a CPU divide and multiply so anyway."""
_NO_COMPILER = (
    "install a C++ compiler (for a GPU Triton, which comes with torch), set TORCHINDUCTOR_CACHE_DIR to a folder that "
    "can be written, or write optim.compile: false"
)


class Weights(NamedTuple):
    """A chunk's weights, which are replaced, and how.

    Args:
        values: float32 or bfloat16, shaped as its moments are kept.
        skip: Whether they stay as they are, and the moments too; bool scalar. None: they do not.
        noise: bfloat16 weights are rounded at random: seed, int64 scalar, that counts from the chunk's first value.
        exact: Whether square roots are rounded correctly.
    """

    values: Tensor
    skip: Tensor | None
    noise: Tensor | None
    exact: bool

    def replace(self, new: Tensor) -> None:
        """Gives them new values, float32."""
        if self.noise is not None:
            new = stochastic_bfloat16(new, seed=self.noise, first_index=0)
        replace_unless(self.skip, self.values, new)


class AdamTerms(NamedTuple):
    """What AdamW's formula has beside weights, gradients and moments. Scalars: float64, on the count's device."""

    betas: tuple[float, float]
    eps: float
    decay: Tensor  # scalar: factor of the weights
    root: Tensor  # scalar: of the second moment's bias correction
    rate: Tensor  # scalar: learning rate over the first moment's bias correction


def adamw(weights: Weights, grad: Tensor, first: Stored, second: Stored, terms: AdamTerms) -> None:
    """One AdamW update of a chunk (Loshchilov and Hutter 2019, as torch writes it)."""
    root = exact_root if weights.exact else torch.sqrt
    beta1, beta2 = terms.betas
    grad, may_stay = grad.float(), weights.skip is not None  # then what is stored must not be changed on the way
    mean = first.load(copy=may_stay)
    mean = lerp(mean, grad, 1.0 - beta1, out=mean)
    square = add_square_(second.load(copy=may_stay).mul_(beta2), grad, 1.0 - beta2)
    denominator = root(square).div_(terms.root).add_(terms.eps)
    change = torch.div(mean, denominator, out=denominator).mul_(terms.rate)
    first.store(mean, weights.skip)
    second.store(square, weights.skip, root=root)
    weights.replace((weights.values.float() * terms.decay).sub_(change))


def accelerate(momentum: Stored, grad: Tensor, ahead: Tensor, factor: float, skip: Tensor | None) -> None:
    """Updates Muon's momentum, M <- f M + (1 - f) G, and writes f M + (1 - f) G (Nesterov) to `ahead`."""
    grad = grad.float()
    mean = momentum.load(copy=skip is not None)
    mean = lerp(mean, grad, 1.0 - factor, out=mean)
    lerp(grad, mean, factor, out=ahead)
    momentum.store(mean, skip)


def descend(weights: Weights, step: Tensor, rate: float | Tensor, decay: float | Tensor) -> None:
    """decay W - rate step."""
    weights.replace(subtract_scaled_(weights.values.float() * decay, step, rate))


@cache
def in_one_kernel(update: Update) -> Update:
    """An update that torch.compile makes one kernel of, for chunks of any length.

    It is compiled for each dtype and size of blocks, seconds each, unless an earlier run has left the kernel in torch's
    cache. A chunk of a single block, as where a rank's part begins inside one, is updated as it stands; so is, with the
    same bits, whatever is of a ninth kind, where torch stops compiling and says so (`recompile_limit`).
    """
    from torch._dynamo.exc import TorchDynamoException as failed  # late: it imports the compiler

    options = _ROUNDED_AS_IN_EAGER if torch.cuda.is_available() else None
    compiled = torch.compile(update, dynamic=False, options=options)

    def run(chunk: Weights | Stored, values: Tensor, *others: Any) -> None:
        length = values.shape[0]
        if length == 1:
            update(chunk, values, *others)
            return
        for tensor in _of_chunk((chunk, values, *others)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        with explained("optim.compile: torch.compile makes no kernel of an update", _NO_COMPILER, of=(failed,)):
            compiled(chunk, values, *others)

    return run


def _of_chunk(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors in an update's arguments that are as long as the chunk: not scalars, nor tables of levels."""
    for arg in args:
        if isinstance(arg, Stored):
            yield from _of_chunk((arg.values, arg.scales))
        elif isinstance(arg, tuple):
            yield from _of_chunk(arg)
        elif isinstance(arg, Tensor) and arg.dim():
            yield arg
