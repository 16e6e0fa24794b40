"""What `LoQTLinear.weight` is: W_eff for code that reads a linear layer's weight instead of calling the layer.

Most of that code asks for a dtype, a device or a shape (T5: `self.wo.weight.dtype`), which costs nothing here. Whoever
computes with it gets the dense matrix, with its gradients, for as long as the result is held: the values are those that
the layer would have used, the memory is that of an ordinary linear layer. It cannot be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from loqt_scale.errors import UserError
from loqt_scale.functional.dense_weight import DenseWeight

if TYPE_CHECKING:
    from loqt_scale.layers.linear import LoQTLinear

_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_nested", "grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "__len__", "stride")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size", "get_device")),
}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_WITHOUT_GRADIENT = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


class LazyWeight(Tensor):
    """W_eff of a layer, dense when it is computed with; see the module's docstring.

    Attributes:
        layer: Whose.
        detached: Whether gradients end here.
    """

    layer: LoQTLinear
    detached: bool

    @staticmethod
    def __new__(cls, layer: LoQTLinear, *, detached: bool = False) -> LazyWeight:
        base, factor = layer.spec.base, layer.factor
        view: LazyWeight = Tensor._make_wrapper_subclass(
            cls, (base.rows, base.cols), dtype=factor.dtype, device=factor.device
        )
        view.layer, view.detached = layer, detached
        return view

    def materialize(self) -> Tensor:
        """The dense matrix, a fresh tensor; part of the graph where gradients are recorded."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return dense_weight(self.layer)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)  # torch.nn.init hands its tensor over by name
        if isinstance(first, LazyWeight):
            if func in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func == _REQUIRES_GRAD:
                return torch.is_grad_enabled() and not first.detached and first.layer.factor.requires_grad
            if func in _WITHOUT_GRADIENT:
                return LazyWeight(first.layer, detached=True)
            _refuse_writing(getattr(func, "__name__", ""))
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UserError(f"{func} cannot read the weight of a LoQT layer; give it layer.effective_weight()")


def dense_weight(layer: LoQTLinear) -> Tensor:
    """W_eff in the dtype of B, as the weight is stored, with gradients for B and the probe.

    Raises:
        UserError: The layer's parameters are sharded and not gathered at the moment.
    """
    base, projection = layer.base, layer.projection
    if hasattr(base.codes, "placements") or base.codes.shape != layer.spec.base.codes_shape:
        raise UserError(
            "the weight of a sharded LoQT layer can be read while its own module computes only; for the whole model's "
            "dense weights write loqt_scale.to_dense(model)"
        )
    probe, omega = (None, None) if layer.probe is None else (layer.probe.leaf, layer.probe.omega)
    packed = base.codes, base.scales, projection.codes, projection.scales
    weight: Tensor = DenseWeight.apply(*packed, layer.factor, probe, omega, layer.spec, layer.factor.dtype)
    return weight


def _refuse_writing(name: str) -> None:
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in ("__set__", "__setitem__") or (name.startswith("__i") and name.endswith("__")):
        raise UserError(
            f"the weight of a LoQT layer is computed from W_q, P and B and cannot be written ({name}); initialize or "
            "load weights before convert_to_loqt, and freeze or train layer.factor"
        )
