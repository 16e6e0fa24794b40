"""What a run reports about itself, and where.

* `MetricsWriter`: the same scalars to `metrics.jsonl` (for scripts) and TensorBoard (for eyes);
* `replay`: TensorBoard's curves anew, from `metrics.jsonl`;
* `Progress`: one bar on a terminal, about twenty plain lines in a log file;
* `RateMeter`: tokens and seconds per step, from the host's clock alone;
* `Throughput`: TFLOP/s, MFU and HFU, from counted FLOPs;
* `memory_metrics`: peak memory of this process;
* `format_*`: numbers as people read them.

Nothing in here waits for a device or talks to another rank: every value is a plain number that the caller already has.
"""

from loqt_scale.metrics.console import Console
from loqt_scale.metrics.meters import RateMeter, memory_metrics
from loqt_scale.metrics.progress import Progress
from loqt_scale.metrics.reminder import Reminder, Tell
from loqt_scale.metrics.text import (
    format_bytes,
    format_count,
    format_duration,
    format_perplexity,
    format_span,
    perplexity,
)
from loqt_scale.metrics.throughput import DEVICES, Throughput, peak_tflops
from loqt_scale.metrics.wandb_run import check_wandb
from loqt_scale.metrics.writer import METRICS_FILE, MetricsWriter, replay

__all__ = [
    "DEVICES",
    "METRICS_FILE",
    "Console",
    "MetricsWriter",
    "Progress",
    "RateMeter",
    "Reminder",
    "Tell",
    "Throughput",
    "check_wandb",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_perplexity",
    "format_span",
    "memory_metrics",
    "peak_tflops",
    "perplexity",
    "replay",
]
