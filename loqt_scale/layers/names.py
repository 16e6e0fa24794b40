"""Names of a model's parts as they were before somebody wrapped parts of it.

`torch.compile(block)`, `checkpoint_wrapper(block)` and `DistributedDataParallel(block)` put a module around another,
and a word of their own into the names of what is inside. Patterns, weights before quantization and saved folders have
the names without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

WORDS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and checkpoint_wrapper's; no user's


def plain_name(name: str) -> str:
    """A dotted name without torch.compile's and checkpoint_wrapper's words."""
    return ".".join(part for part in name.split(".") if part not in WORDS)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules`, under plain names; wrappers have the name of what is inside."""
    paths: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        parent, _, leaf = path.rpartition(".")
        above, around = paths.get(parent, ("", module))
        hidden = leaf in WORDS or (leaf == "module" and is_replicated(around))
        name = above if hidden else f"{above}.{leaf}".lstrip(".")
        paths[path] = name, module
        yield name, module


def plain_keys(model: nn.Module) -> Callable[[str], str]:
    """What turns names of a model's state dict into plain ones."""
    raw = (path for path, _ in model.named_modules(remove_duplicate=False))
    plain = dict(zip(raw, (name for name, _ in named_modules(model, remove_duplicate=False)), strict=True))

    def turn(key: str) -> str:
        path, _, leaf = key.rpartition(".")
        return f"{plain.get(path, plain_name(path))}.{leaf}".lstrip(".")

    return turn


def is_replicated(module: nn.Module) -> bool:
    """Whether a module is a DistributedDataParallel."""
    return list(module._modules) == ["module"] and hasattr(module, "reducer")
