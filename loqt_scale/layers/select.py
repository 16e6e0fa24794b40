"""Which candidates of a model become LoQT layers, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from loqt_scale.config import LoQTConfig
from loqt_scale.errors import UserError
from loqt_scale.layers.candidates import Candidate, candidates
from loqt_scale.layers.conversion_report import (
    EMBEDDING,
    EXCLUDED,
    HEAD,
    NOT_TARGETED,
    VECTORS,
    ConversionReport,
    Left,
)
from loqt_scale.layers.names import named_modules

_EVERYTHING = "*"


@dataclass(frozen=True)
class Selection:
    """What a conversion will do.

    Args:
        chosen: Candidates to convert, with their ranks, in module order.
        left: Reasons of the others, by name.
    """

    chosen: list[tuple[Candidate, int]]
    left: dict[str, str]

    def report(self, model: nn.Module) -> ConversionReport:
        """The report of it, made before the model is changed."""
        owners = {id(weight): candidate.name for candidate, _ in self.chosen for weight in candidate.weights}
        named = list(model.named_parameters())
        converted = sum(parameter.numel() for _, parameter in named if id(parameter) in owners)
        left = _left(model, set(owners), self.left)
        return ConversionReport([candidate.name for candidate, _ in self.chosen], converted, left)


def select(model: nn.Module, config: LoQTConfig) -> Selection:
    """Chooses what `convert_to_loqt` replaces.

    Raises:
        ValueError: Nothing can be chosen, or a pattern of ranks is a mistake.
    """
    found = list(candidates(model))
    shared, heads = _shared_weights(model), set() if not config.exclude_modules else head_modules(model)
    chosen, small, left = [], [], {}
    for candidate in found:
        why = _why_left(candidate, config, shared, heads)
        if why is None and config.rank_of(candidate.name) > min(candidate.shape):
            small.append(candidate)
            why = f"smaller than its rank {config.rank_of(candidate.name)}"
        why = why or candidate.misfit(config, config.rank_of(candidate.name))
        if why is None:
            chosen.append((candidate, config.rank_of(candidate.name)))
        else:
            left[candidate.name] = why
    _check_ranks([candidate for candidate, _ in chosen], small, config)
    if not chosen:
        raise UserError(_nothing(model, found, left, config))
    return Selection(chosen, left)


def unmatched_patterns(model: nn.Module, config: LoQTConfig) -> Iterator[tuple[str, str]]:
    """(setting, pattern) of each pattern that is no default and that nothing in the unconverted model is called."""
    names = {name for name, _ in named_modules(model)} | {candidate.name for candidate in candidates(model)}
    usual = {_EVERYTHING, *LoQTConfig().exclude_modules}
    for key in ("target_modules", "exclude_modules"):
        for pattern in getattr(config, key):
            if pattern not in usual and not any(fnmatchcase(name, pattern) for name in names):
                yield key, pattern


def _why_left(candidate: Candidate, config: LoQTConfig, shared: set[int], heads: set[str]) -> str | None:
    name = candidate.name
    if not any(fnmatchcase(name, pattern) for pattern in config.target_modules):
        return NOT_TARGETED
    if any(fnmatchcase(name, pattern) for pattern in config.exclude_modules):
        return EXCLUDED
    if any(id(weight) in shared for weight in candidate.weights):
        return "tied to another parameter"
    if candidate.obstacle is not None:
        return candidate.obstacle
    if name in heads and not any(fnmatchcase(name, p) for p in config.target_modules if p != _EVERYTHING):
        return HEAD
    return None


def head_modules(model: nn.Module) -> set[str]:
    """Names of the modules of Hugging Face models that turn hidden states into outputs.

    They are the model's own output embeddings, and all that a task's model holds outside of its base model
    (`classifier` and `pooler` of a DebertaForSequenceClassification, `score` of a LlamaForSequenceClassification, ...).
    """
    heads: set[str] = set()
    for root, module in named_modules(model):
        if not isinstance(getattr(module, "base_model_prefix", None), str):
            continue
        base, output = getattr(module, "base_model", module), _output_embeddings(module)
        for below, inner in named_modules(module):
            name = f"{root}.{below}".strip(".")
            outside = base is not module and not _is_beneath(name, f"{root}.{module.base_model_prefix}".lstrip("."))
            if (outside and name != root) or (inner is output and output is not None):
                heads.add(name)
    return heads


def _is_beneath(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.") or prefix.startswith(f"{name}.")


def _output_embeddings(module: nn.Module) -> object:
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _check_ranks(chosen: list[Candidate], small: list[Candidate], config: LoQTConfig) -> None:
    """Refuses a pattern of ranks that matches nothing, and ranks that somebody asked for and cannot have."""
    left = [candidate.name for candidate in (*chosen, *small)]
    for pattern in config.rank_pattern:
        others = [name for name in left if not fnmatchcase(name, pattern)]
        if len(others) == len(left):
            raise UserError(
                f"loqt.rank_pattern has {pattern!r}, which no converted layer is left to match after the patterns "
                f"before it; left are: {', '.join(left[:8]) or 'none'}"
            )
        left = others
    named = [c for c in small if any(fnmatchcase(c.name, pattern) for pattern in config.rank_pattern)]
    wrong = named or ([] if chosen else small)
    if not wrong:
        return
    candidate = max(wrong, key=lambda item: min(item.shape))
    rank, (rows, cols) = config.rank_of(candidate.name), candidate.shape
    key = "a rank of loqt.rank_pattern" if named else "loqt.rank"
    raise UserError(
        f"{key} is {rank}, but {candidate.name} is {rows} x {cols}; write {min(rows, cols)} or less, or name the layer "
        "in loqt.exclude_modules or loqt.rank_pattern"
    )


def _nothing(model: nn.Module, found: list[Candidate], left: dict[str, str], config: LoQTConfig) -> str:
    alike: dict[str, list[str]] = {}  # by the reason
    for candidate in found:
        alike.setdefault(left[candidate.name], []).append(candidate.name)
    few = [f"{', '.join(each[:2])}{', ...' if each[2:] else ''} ({why})" for why, each in list(alike.items())[:4]]
    names = "; ".join(few) or "none"
    if not found:
        reasons = {item.why: item.name for item in _left(model, set(), {}) if item.why != VECTORS}
        names += "".join(f"; {name} is {why}" for why, name in list(reasons.items())[:4])
    return (
        f"loqt.target_modules {config.target_modules} (without loqt.exclude_modules {config.exclude_modules}) "
        f"matches no linear layer that can be converted; the model's are: {names}"
    )


# ---- what is left --------------------------------------------------------------------------------------------------

NORMS_AND_BIASES = "norms, biases and other vectors"


def _left(model: nn.Module, converted: set[int], reasons: dict[str, str]) -> Iterator[Left]:
    vectors, seen = 0, set(converted)
    for prefix, module in named_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{leaf}".lstrip(".")
            layer = name.removesuffix(".weight")
            if parameter.dim() < 2 and layer not in reasons and name not in reasons:
                vectors += parameter.numel()
            else:
                why = reasons.get(name) or reasons.get(layer) or _describe(module, parameter)
                yield Left(layer, why, parameter.numel())
    if vectors:
        yield Left(NORMS_AND_BIASES, VECTORS, vectors)


def _describe(module: nn.Module, parameter: nn.Parameter) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return EMBEDDING
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if hasattr(module, "parametrizations") or kind == "ParametrizationList":
        return "parametrized (weight norm or the like)"
    if parameter.dim() == 2:
        return f"a matrix that {kind} holds itself, outside of any linear layer"
    if parameter.dim() == 3 and "Expert" in kind:
        return f"experts whose own forward reads their matrices ({kind}, without transformers' marks of such modules)"
    return f"a {parameter.dim()}-dimensional parameter of {kind}"


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
