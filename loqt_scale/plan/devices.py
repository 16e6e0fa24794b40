"""What is assumed of GPUs and interconnects: the table `devices.yaml`, or one that the user gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from loqt_scale.errors import ConfigError, explained
from loqt_scale.metrics import DEVICES

T = TypeVar("T")
_SHARES = ("products", "attention", "memory", "dequantize", "fused", "network", "unhidden")


@dataclass(frozen=True)
class Gpu:
    """The maker's figures: dense TFLOP/s in bfloat16 and float32, GB/s and GB of memory, names of interconnects."""

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    inside: str
    across: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in float32 or bfloat16."""
        return 1e12 * (self.float32 if dtype == "float32" else self.bfloat16)


@dataclass(frozen=True)
class Assumptions:
    """Fractions that are reached, and what things cost: `devices.yaml` says of each what it is."""

    node_gpus: float
    products: float
    attention: float
    memory: float
    dequantize: float
    fused: float
    network: float
    unhidden: float
    launch_us: float
    merge_products: float
    factorise: float
    merge_rounds: float
    merge_bytes: float


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind and what connects them.

    Args:
        name: The GPU's.
        gpu: Its figures.
        link: Name of the interconnect that bounds a ring through all ranks.
        link_rate: GB/s of it, one direction, a GPU.
        inside_rate: GB/s of what connects the GPUs of one node.
        assumed: The rest.
    """

    name: str
    gpu: Gpu
    link: str
    link_rate: float
    inside_rate: float
    assumed: Assumptions


def find_machine(name: str, *, gpus: int, interconnect: str | None = None, path: str | None = None) -> Machine:
    """Looks a machine up.

    Args:
        name: A GPU's name in the table, in any case.
        gpus: How many; more than a node has are connected by the GPU's network.
        interconnect: Another one's name in the table, which then bounds a ring through all: inside of the node, or
            where there are several, between them. Default: the GPU's own.
        path: A table of the user's. Default: `devices.yaml`.

    Raises:
        ConfigError: The table cannot be read or lacks a value, or has no such name.
    """
    table = _read_table(path)
    where = "" if path is None else f" in {path}"
    known = {key.lower(): key for key in table["gpus"]}
    key = _known(name.lower(), known, f"gpu is '{name}'", where)
    gpu = _made(Gpu, table["gpus"][known[key]], f"gpus.{known[key]}{where}")
    assumed = _made(Assumptions, table["assumptions"], f"assumptions{where}")
    for share in _SHARES:
        if getattr(assumed, share) > 1:
            raise ConfigError(
                f"assumptions.{share}{where} is {getattr(assumed, share):g}; write a share of the whole, above 0 and "
                "at most 1"
            )
    own = gpu.inside if gpus <= assumed.node_gpus else gpu.across
    links = table["interconnects"]

    def rate(link: str) -> float:
        return _number(links[_known(link, links, f"interconnect is '{link}'", where)], f"interconnects.{link}{where}")

    link = interconnect or own
    inside = link if gpus <= assumed.node_gpus else gpu.inside
    return Machine(known[key], gpu, link, rate(link), rate(inside), assumed)


def _known(name: str, names: dict[str, Any], said: str, where: str) -> str:
    if name not in names:
        listed = ", ".join(str(value) if isinstance(value, str) else key for key, value in names.items())
        raise ConfigError(f"{said}, which is not known{where}; write one of {listed}, or give a table: --devices FILE")
    return name


def _read_table(path: str | None) -> dict[str, dict[str, Any]]:
    source = DEVICES if path is None else Path(path)
    advice = "write a file such as loqt_scale/devices.yaml"
    with explained(
        f"devices {path} cannot be read", advice, of=(OSError, yaml.YAMLError, UnicodeError), kind=ConfigError
    ):
        table = yaml.safe_load(source.read_text(encoding="utf-8"))
    for key in ("gpus", "interconnects", "assumptions"):
        if not isinstance(table, dict) or not isinstance(table.get(key), dict):
            raise ConfigError(f"devices {path} has no mapping '{key}'; {advice}")
    return table


def _made(cls: type[T], values: Any, where: str) -> T:
    names = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    given = values if isinstance(values, dict) else {}
    wrong = sorted(set(names) ^ set(given))
    if wrong:
        raise ConfigError(f"{where} must have the keys {', '.join(names)}; add or remove {', '.join(map(str, wrong))}")
    checked = {key: str(given[key]) if names[key] == "str" else _number(given[key], f"{where}.{key}") for key in names}
    return cls(**checked)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where} is {value!r}; write a number above 0")
    return float(value)
