"""Where initial weights come from, one slice of rows at a time.

No rank may ever hold the full-precision model, so nobody here returns one. A model is built on the meta device, where
tensors have shapes and no storage. Every rank then asks a `WeightSource` for rows [start, stop) of one parameter,
quantizes or copies them, and drops them before it asks for the next. Three rules follow:

* a slice holds the same numbers however a parameter is cut, so runs on 1 and on 64 ranks start from the same model;
* a source can be asked again: the first merge needs the true initial weights once more;
* the caller owns what it gets: writing into a slice changes nothing in the source.

`RandomWeights` draws what the model's own initialiser would draw, in chunks with a random stream each.
`SafetensorsWeights` reads slices of files, `DenseWeights` of tensors already in memory; `pretrained_weights` chooses
between those two. Buffers, the other tensors that the meta device leaves empty, are small: `buffers.init_buffers`
computes all of them on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from loqt_scale.errors import MissingFileError, UserError
from loqt_scale.functional.seeding import isolated_rng
from loqt_scale.model.hf_folder import CAREFULLY, indexed_files
from loqt_scale.model.structure import bare_copy, skeleton, tied_names
from loqt_scale.process.caller import warn_caller

CHUNK_ELEMENTS = 2**18
"""Numbers drawn at a time (1 MB): a rank that owns few rows draws at most two chunks that it does not keep all of."""

_aten = torch.ops.aten
# Calls that treat every element alike, so that running them on some rows equals running them on all. No arithmetic: it
# could hide a `trunc_normal_` or `orthogonal_` before it, which do nothing on meta and so go unseen.
_ELEMENTWISE = {_aten.normal_, _aten.uniform_, _aten.zero_, _aten.fill_, _aten.detach}


class WeightSource(Protocol):
    """Something that knows every parameter of the original, unconverted model."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of dimension 0 of a parameter.

        Args:
            name: As in the original model's `named_parameters()`; either name of a tied parameter will do.
            start: First row.
            stop: One past the last row; equal to `start` for an empty slice.

        Returns:
            float32 on the CPU, (stop - start, *rest). A parameter without dimensions counts as one row: (1,).

        Raises:
            ValueError: Unknown name, or rows outside of the parameter.
        """
        ...


def _row_shape(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(shape) or (1,)


def _check(name: str, shapes: Mapping[str, tuple[int, ...]], start: int, stop: int) -> tuple[int, ...]:
    """The shape of `name`, once its name and the rows asked for are known to be right."""
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1, cutoff=0.0)
        raise ValueError(
            f"there are no weights for a parameter {name!r}; the nearest name is {near[0] if near else ''!r}"
        )
    shape = shapes[name]
    if not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"rows [{start}, {stop}) of {name} were asked for; write rows within [0, {shape[0]})")
    return shape


# ---- random: the model's own initialiser, a chunk of rows at a time ------------------------------------------------


def _initialize(path: list[nn.Module]) -> None:
    """Initialise the last module of a root-to-owner path as Hugging Face would: bottom up, each by its nearest model.

    Ancestors take their turn too: some overwrite what a child drew (GPT-2 scales down its residual projections).
    A module with no `PreTrainedModel` above it has only its own `reset_parameters`.
    """
    for depth in reversed(range(len(path))):
        nearest = next((m for m in reversed(path[: depth + 1]) if isinstance(m, PreTrainedModel)), None)
        if nearest is not None:
            nearest._init_weights(path[depth])
        elif depth == len(path) - 1:
            _reset(path[depth])


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


class _Recorder(TorchDispatchMode):
    """Notes the operations that run, with their plain arguments and whether they write into `target`."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._storage = target.untyped_storage()._cdata
        self.calls: list[tuple[Any, ...]] = []
        self.elementwise = True
        self.hit = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = [a for a in args[1:] if not isinstance(a, torch.Tensor)]
        self.calls.append((func, plain, kwargs or {}))
        self.elementwise &= func.overloadpacket in _ELEMENTWISE and len(plain) == len(args) - 1
        if args and isinstance(args[0], torch.Tensor):
            self.hit |= args[0].untyped_storage()._cdata == self._storage
        return func(*args, **(kwargs or {}))


class RandomWeights:
    """Initial weights drawn as the model's own initialiser draws them, without ever holding a large parameter.

    A parameter is drawn in chunks of about `CHUNK_ELEMENTS` numbers. Each chunk has its own random stream, named by
    (seed, parameter, chunk), and is filled by running the model's `_init_weights` (`reset_parameters` outside of
    Hugging Face) on a stand-in for the owning module that has only those rows. That is right only if the initialiser
    treats all rows alike, with numbers that do not depend on how many there are. So it is first run on meta tensors
    with all rows and with one chunk's, and the operations compared; where they differ (Xavier) or are not plain draws
    and fills (orthogonal, truncated normal), the parameter is drawn whole.

    Args:
        model: The original model, before any layer is converted. Only its structure is kept (as meta tensors), so
            replacing its layers later changes nothing here.
        seed: Names the streams; the global random state is neither read nor changed.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._root = skeleton(model)
        self._seed = seed
        self._first_name: dict[str, str] = {name: names[0] for names in tied_names(model) for name in names}
        parameters = model.named_parameters(remove_duplicate=False)
        self._shapes = {name: _row_shape(parameter.shape) for name, parameter in parameters}
        self._drawn: tuple[tuple[str, int], torch.Tensor] | None = None  # the last chunk: readers come in small steps
        self._chunk_rows: dict[str, int] = {}  # 0: whole, together with the other parameters of its module

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `WeightSource.rows`.

        Raises:
            ValueError: Also if the model has no initialiser for this parameter.
        """
        shape = _check(name, self._shapes, start, stop)
        name = self._first_name[name]
        if name not in self._chunk_rows:
            self._chunk_rows[name] = self._find_chunk_rows(name)
        size = self._chunk_rows[name] or shape[0]
        out = torch.empty(stop - start, *shape[1:])
        chunks = range(start // size, -(-stop // size)) if stop > start else ()
        for chunk in chunks:
            first, last = chunk * size, min((chunk + 1) * size, shape[0])
            low, high = max(first, start), min(last, stop)
            if self._drawn is None or self._drawn[0] != (name, chunk):
                self._drawn = ((name, chunk), self._draw(name, chunk, first, last))
            out[low - start : high - start] = self._drawn[1][low - first : high - first]
        return out

    def _find_chunk_rows(self, name: str) -> int:
        """Rows to draw at a time; 0 where the initialiser looks at more than some rows of this parameter alone."""
        shape = self._shapes[name]
        size = min(shape[0], max(1, CHUNK_ELEMENTS // max(1, torch.Size(shape[1:]).numel())))
        records = []
        for rows in (shape[0], size):
            # No padding row here: zeroing one row is no elementwise call, and `_draw` takes care of it.
            path, target = self._stand_in(name, (0, rows), device="meta", alone=True, padding=False)
            try:
                with isolated_rng(), _Recorder(target) as record:
                    _initialize(path)
            except (RuntimeError, NotImplementedError):  # it reads values, which meta tensors lack
                return 0
            records.append(record)
        separable = all(record.hit and record.elementwise for record in records)
        return size if separable and records[0].calls == records[1].calls else 0

    def _draw(self, name: str, chunk: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of one chunk, (last - first, *rest), from that chunk's own stream."""
        alone = self._chunk_rows[name] > 0
        path, target = self._stand_in(name, (first, last), device="cpu", alone=alone, padding=True)
        with isolated_rng(self._seed, name, chunk):
            _initialize(path)
            if bool(target.isnan().any()):
                # Not covered by the model's `_init_weights`: such a module keeps what its constructor drew.
                _reset(path[-1])
                _initialize(path)
        if bool(target.isnan().any()):
            raise UserError(
                f"nothing initialises the parameter {name} (of a {type(path[-1]).__name__}); give that module a "
                "reset_parameters(), cover it in the model's _init_weights, or write model.weights: pretrained"
            )
        return target.data.reshape(last - first, *self._shapes[name][1:])

    def _stand_in(
        self, name: str, span: tuple[int, int], *, device: str, alone: bool, padding: bool
    ) -> tuple[list[nn.Module], torch.Tensor]:
        """Stand-ins for the modules from the root to the owner of `name`, the owner with only the rows of `span`.

        Returns:
            (path, target): the modules, root first, and the owner's parameter: float32, NaN, the rows of `span`. The
            owner's other parameters stay on meta if `alone`, else they are like it, with all of their rows.
        """
        owner_name, _, leaf = name.rpartition(".")
        path = [bare_copy(self._root)]
        for part in filter(None, owner_name.split(".")):
            child = bare_copy(cast(nn.Module, path[-1]._modules[part]))
            path[-1]._modules[part] = child
            path.append(child)
        owner, (first, last) = path[-1], span
        for other, parameter in owner._parameters.items():
            if parameter is None or (alone and other != leaf):
                continue
            shape = (last - first, *parameter.shape[1:]) if parameter.dim() and other == leaf else parameter.shape
            owner._parameters[other] = nn.Parameter(torch.full(shape, torch.nan, device=device), requires_grad=False)
        if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
            row = owner.padding_idx - first
            owner.padding_idx = row if padding and 0 <= row < last - first else None
        return path, cast(torch.Tensor, owner._parameters[leaf])


# ---- pretrained: slices of files, or of tensors in memory ----------------------------------------------------------


class DenseWeights:
    """Weights that are in memory already.

    Args:
        tensors: Full tensors by parameter name; any floating dtype and device. They are not copied.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.shapes = {name: _row_shape(tensor.shape) for name, tensor in tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `WeightSource.rows`; ValueError also for NaN or infinity."""
        shape = _check(name, self.shapes, start, stop)
        rows = self._tensors[name].detach().reshape(shape)[start:stop]
        return _finite(name, rows.to("cpu", torch.float32, copy=True))


class SafetensorsWeights:
    """Weights read from a folder's safetensors files, only the bytes of the rows asked for.

    Args:
        folder: Holds `model.safetensors`, or shards with their `model.safetensors.index.json`.
        stored_names: Parameter name to stored name, where they differ.

    Raises:
        FileNotFoundError: Neither is there, or a shard of the index is missing.
    """

    def __init__(self, folder: str | Path, stored_names: Mapping[str, str] | None = None) -> None:
        self._stored_names = dict(stored_names or {})
        self._files: dict[str, Any] = {
            name: handle
            for handle in (safe_open(path, framework="pt", device="cpu") for path in _safetensors_files(Path(folder)))
            for name in handle.keys()  # noqa: SIM118 (not a dict)
        }
        self.shapes = {name: _row_shape(f.get_slice(name).get_shape()) for name, f in self._files.items()}
        self.shapes |= {name: self.shapes[stored] for name, stored in self._stored_names.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `WeightSource.rows`; ValueError also for NaN or infinity."""
        shape = _check(name, self.shapes, start, stop)
        if start == stop:
            return torch.empty(0, *shape[1:])
        stored = self._stored_names.get(name, name)
        view = self._files[stored].get_slice(stored)
        rows = view[start:stop] if view.get_shape() else self._files[stored].get_tensor(stored).reshape(1)
        # A copy, since the slice may be a view of the mapped file, which has to stay as it is for the next reader.
        return _finite(name, cast(torch.Tensor, rows).to(torch.float32, copy=True))


def _finite(name: str, rows: torch.Tensor) -> torch.Tensor:
    """The rows themselves, unless one holds NaN or infinity."""
    if not bool(torch.isfinite(rows).all()):
        raise UserError(f"{name} holds NaN or infinity; write another folder, or model.weights: random")
    return rows


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise MissingFileError(
            f"{folder} has neither {single.name} nor {index.name}; write a folder that save_pretrained wrote, or with "
            "model.path also model.weights: random"
        )
    return indexed_files(index)


def pretrained_weights(folder: str | Path, model: nn.Module) -> WeightSource:
    """A source for the weights of a pretrained model's folder, streamed from its files wherever their names allow it.

    A tied parameter may be stored under any of its names, and all names may lack the model's `base_model_prefix` (as in
    GPT-2's files). If other names differ, transformers loads the whole model into host memory, with a warning.

    Args:
        folder: What `save_pretrained` wrote (`model.path`).
        model: The original model on meta, not yet converted.

    Raises:
        FileNotFoundError: No weights in the folder.
        ValueError: The folder lacks one of the model's parameters, or has it in another shape.
    """
    source: SafetensorsWeights | DenseWeights
    try:
        stored = SafetensorsWeights(folder).shapes
        names, missing = _match_names(model, stored)
        reason = f"its files do not hold {len(missing)} of the model's parameters under their names, e.g. {missing[:1]}"
    except FileNotFoundError as error:
        if not any(Path(folder).glob("pytorch_model*.bin")):
            raise
        names, missing, reason = {}, [""], str(error)
    if missing:
        warn_caller(f"model.path: {reason}; loading the whole model into host memory instead of streaming it")
        source = _load_whole(folder)
        names, missing = _match_names(model, source.shapes)
    else:
        source = SafetensorsWeights(folder, names)
    for name, parameter in model.named_parameters():
        found = source.shapes.get(name)
        if found != _row_shape(parameter.shape):
            raise UserError(
                f"model.path: the folder holds {name} as {found or 'nothing'}, but the model needs "
                f"{tuple(parameter.shape)}; remove what changes it from model.overrides, or write model.weights: random"
            )
    return source


def _match_names(model: nn.Module, stored: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(parameter name to stored name, parameters that are not stored), tied names and base prefix considered."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    matched: dict[str, str] = {}
    missing: list[str] = []
    for names in tied_names(model):
        candidates = [*names, *(name.removeprefix(prefix) for name in names)]
        found = next((name for name in candidates if name in stored), None)
        if found is None:
            missing.append(names[0])
        else:
            matched |= dict.fromkeys(names, found)
    return matched, missing


def _load_whole(folder: str | Path) -> DenseWeights:
    """Everything that transformers' own loader makes of a folder, under the model's names; tied names included."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, weights_only=True, **CAREFULLY
    )
    if info["missing_keys"]:
        raise UserError(
            f"model.path: the folder's weights lack {sorted(info['missing_keys'])[:3]}; write the folder of a complete "
            "causal language model, or model.weights: random"
        )
    return DenseWeights(dict(model.named_parameters(remove_duplicate=False)))
