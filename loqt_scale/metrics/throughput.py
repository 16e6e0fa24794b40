"""How much of a device a run uses: FLOP/s, MFU and HFU from counted FLOPs and tokens per second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

DEVICES = files("loqt_scale").joinpath("devices.yaml")
"""GPUs as their makers sell them, and what `plan` assumes of them and of interconnects."""


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """TFLOP/s that a device is sold with, for products in a dtype; None if it is not in `DEVICES`, or a laptop's.

    Args:
        device_name: As `torch.cuda.get_device_name` says it. That name of the table counts whose words are all in it,
            and of several the longest: an A10G is no A10.
        dtype: bfloat16 or float32.
    """
    words = _words(device_name)
    table = {} if "laptop" in words else yaml.safe_load(DEVICES.read_text(encoding="utf-8"))["gpus"]
    names = [name for name in table if _words(name) <= words]
    return float(table[max(names, key=lambda name: len(_words(name)))][dtype]) if names else None


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower().replace("rtx ", "rtx")))


@dataclass(frozen=True)
class Throughput:
    """Turns tokens per second into shares of a device.

    Args:
        model_flops: FLOPs of a token, without what is recomputed.
        hardware_flops: The same, with it.
        ranks: Devices.
        peak: TFLOP/s of one; None: not known.
    """

    model_flops: float
    hardware_flops: float
    ranks: int
    peak: float | None

    def metrics(self, tokens_per_second: float) -> dict[str, float]:
        """`perf/tokens_per_second_per_rank`, `perf/tflops_per_rank`, and with a peak `perf/mfu`, `perf/hfu` (shares).

        Args:
            tokens_per_second: Of all ranks together.
        """
        rate = tokens_per_second / self.ranks
        tflops, executed = rate * self.model_flops / 1e12, rate * self.hardware_flops / 1e12
        values = {"perf/tokens_per_second_per_rank": rate, "perf/tflops_per_rank": tflops}
        return (
            values if self.peak is None else values | {"perf/mfu": tflops / self.peak, "perf/hfu": executed / self.peak}
        )
