"""How much of a device a run uses: FLOP/s, MFU and HFU from counted FLOPs and tokens per second."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense tensor-core TFLOP/s of bfloat16 with float32 sums, and of float32 (no TF32, which torch leaves off), as makers
# give them. The first name that a device's name contains, as words, counts; an A10G is no A10.
PEAK_TFLOPS = {
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A40": (149.7, 37.4),
    "A10": (125.0, 31.2),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "MI300X": (1307.4, 163.4),
    "MI250X": (191.5, 23.9),
}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """TFLOP/s that a device is sold with, for products in a dtype; None if it is not in `PEAK_TFLOPS`, or a laptop's.

    Args:
        device_name: As `torch.cuda.get_device_name` says it.
        dtype: bfloat16 or float32.
    """
    names = [] if "Laptop" in device_name else [n for n in PEAK_TFLOPS if re.search(rf"\b{n}\b", device_name)]
    return PEAK_TFLOPS[names[0]][dtype == "float32"] if names else None


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
