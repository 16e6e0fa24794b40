"""What of a model can become low-rank: its matrices, wherever a kind of module keeps them.

A *kind* looks at one module and says which candidates it holds. `KINDS` has them all; a new kind of module (experts
that share one parameter, say) is one more function there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.layers.experts import matrix_names, put_experts
from loqt_scale.layers.layer import layer_spec
from loqt_scale.layers.linear import LoQTLinear, is_conv1d
from loqt_scale.layers.names import named_modules

IN_ADAPTER = "in an adapter of peft; merge it first: model = model.merge_and_unload().requires_grad_(True)"


@dataclass(frozen=True)
class Candidate:
    """Weights that one LoQT layer can take the place of.

    Args:
        name: What patterns of names and ranks are matched with, and reports print.
        shape: (out features, in features) of the matrix, or of each of several.
        weights: The parameters that go into the layer's packed base. Biases and what else moves along are not listed.
        obstacle: Why it cannot be converted, whatever the settings; None if it can.
        convert: Called with the model, the settings and the rank: puts the layer into the model, in place.
        misfit: Called with the settings and the rank: why it cannot be converted with these; None if it can.
    """

    name: str
    shape: tuple[int, int]
    weights: tuple[nn.Parameter, ...]
    obstacle: str | None
    convert: Callable[[nn.Module, LoQTConfig, int], None] = field(repr=False)
    misfit: Callable[[LoQTConfig, int], str | None] = field(repr=False, default=lambda config, rank: None)

    @property
    def values(self) -> int:
        """Elements of its weights."""
        return sum(weight.numel() for weight in self.weights)


Kind = Callable[[str, nn.Module], list[Candidate]]


def linear_candidates(name: str, module: nn.Module) -> list[Candidate]:
    """`nn.Linear`, its subclasses that compute the same, and transformers' `Conv1D`, whose weight is transposed."""
    conv = is_conv1d(module)
    if not (conv or isinstance(module, nn.Linear)):
        return []
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return []  # parametrized: the parameter has another name, and is reported under it
    if nn.parameter.is_lazy(weight):
        raise UserError(f"{name} has no shape yet ({type(module).__name__}); call the model once, then convert_to_loqt")
    rows, cols = weight.shape if weight.dim() == 2 else (0, 0)

    def convert(model: nn.Module, config: LoQTConfig, rank: int) -> None:
        replace_everywhere(model, module, LoQTLinear.from_linear(module, config, rank=rank))

    return [Candidate(name, (cols, rows) if conv else (rows, cols), (weight,), _obstacle(module), convert)]


def experts_candidates(name: str, module: nn.Module) -> list[Candidate]:
    """The 3-D parameters of a mixture's experts, each with the name of the parameter."""
    return [_experts_candidate(name, module, leaf) for leaf in matrix_names(module)]


def _experts_candidate(name: str, module: nn.Module, leaf: str) -> Candidate:
    weight, transposed = getattr(module, leaf), bool(module.is_transposed)
    _, rows, cols = weight.shape
    out_features, in_features = (cols, rows) if transposed else (rows, cols)

    def convert(model: nn.Module, config: LoQTConfig, rank: int) -> None:
        put_experts(module, leaf, config, rank)

    def misfit(config: LoQTConfig, rank: int) -> str | None:
        each = layer_spec(in_features, out_features, config, rank, transposed=transposed)
        for layout in (each.base, each.projection):
            if layout.rows % layout.group_rows:
                return (
                    f"experts of {layout.rows} rows, which are no multiple of the {layout.group_rows} rows that "
                    f"{layout.cols} columns need for whole blocks (loqt.quantization.block_size, loqt.rank)"
                )
        return None

    path = f"{name}.{leaf}".lstrip(".")
    obstacle = _experts_obstacle(module, weight)
    return Candidate(path, (out_features, in_features), (weight,), obstacle, convert, misfit)


def _experts_obstacle(module: nn.Module, weight: nn.Parameter) -> str | None:
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if getattr(module, "_is_expert_parallel", False):
        return "experts spread over ranks by transformers' own expert parallelism"
    if not weight.is_floating_point():
        return f"a {type(module).__name__} that is quantized already"
    if made := _made_of_others(weight):
        return f"experts whose weight is a {made}"
    if "forward" in vars(module):
        return "a replaced forward, which would be lost"
    return None


KINDS: list[Kind] = [linear_candidates, experts_candidates]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """All candidates of a model, in module order, under plain names."""
    adapters = _in_adapters(model)
    for name, module in named_modules(model):
        for kind in KINDS:
            for candidate in kind(name, module):
                yield replace(candidate, obstacle=IN_ADAPTER) if id(module) in adapters else candidate


def _in_adapters(model: nn.Module) -> set[int]:
    """ids of the modules inside of a model's layers of peft, which is not imported for it."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    layers = [module for module in model.modules() if peft and isinstance(module, peft.BaseTunerLayer)]
    return {id(inner) for layer in layers for inner in layer.modules()}


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, under all names that the model has for it.

    What refers to the old one in another way (a plain list, a closure) would go on with it: it cannot train any more.
    """
    names = []
    for parent_name, parent in list(named_modules(model)):
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = new
                names.append(f"{parent_name}.{child_name}".lstrip("."))
    old.register_forward_pre_hook(_Replaced(names[0]))


class _Replaced:
    """A forward pre-hook of a linear layer that a conversion has taken out of its model.

    Args:
        name: Of its place there.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, args: object) -> None:
        """Refuses to record a graph that ends in weights which train no more.

        Raises:
            UserError: Gradients are recorded.
        """
        if torch.is_grad_enabled():
            raise UserError(
                f"the linear layer that was {self._name} before convert_to_loqt is called: something has kept it (a "
                "plain list, a closure, another model), and it trains no more; make that after the conversion, or name "
                "the layer in exclude_modules"
            )


def _obstacle(linear: nn.Module) -> str | None:
    """Why a linear layer cannot be converted; None if it can."""
    kind = type(linear).__name__
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.dim() != 2:
        return f"a {kind} that is quantized already"
    if made := _made_of_others(weight):
        return f"a {kind} whose weight is a {made}"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if kind == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight and never calls it"
    if "forward" in vars(linear) or _has_hooks(linear):
        return "hooks or a replaced forward, which would be lost"
    if set(linear._parameters) - {"weight", "bias"} or linear._buffers or linear._modules:
        return f"a {kind} that holds more than a weight and a bias"
    if not is_conv1d(linear) and not _computes_linear(linear):
        return f"a subclass of nn.Linear ({kind}) that computes something else"
    return None


def _made_of_others(weight: Tensor) -> str | None:
    """What a weight is that is made of other tensors, as torchao's are; None: it is a plain one."""
    if hasattr(weight, "__tensor_flatten__"):  # torch's sign of them
        return f"{type(weight).__name__}: quantized already, or no plain tensor"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


_ATTRIBUTES = {*vars(nn.Linear(1, 1, device="meta")), "_is_hf_initialized"}


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass does what nn.Linear does, and always will.

    One with a forward of its own is tried; what it keeps in attributes beyond nn.Linear's may change its result later.
    """
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__:
        return False
    return kind.forward is nn.Linear.forward or (vars(module).keys() <= _ATTRIBUTES and _is_product(module))


@torch.no_grad()
def _is_product(module: nn.Module) -> bool:
    """Whether a subclass's own forward is that of nn.Linear: tried on a small stand-in with its settings."""
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 5, 4), (3, 4), (3,)))
    held = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    stand_in.__dict__ |= {"_parameters": held, "in_features": 4, "out_features": 3}
    expected = F.linear(x, weight, held["bias"])
    with torch.random.fork_rng(devices=[]):
        try:
            results = [stand_in.train(mode)(x.clone()) for mode in (True, False)]
        except Exception:  # whatever the class needs that a stand-in lacks
            return False
    return all(isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected) for y in results)
