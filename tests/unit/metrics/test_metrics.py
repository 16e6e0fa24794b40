"""Metrics: strict JSON lines, the same numbers in TensorBoard, progress lines, rates, numbers for people."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loqt_scale.config import OptimConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.metrics import (
    METRICS_FILE,
    MetricsWriter,
    Progress,
    RateMeter,
    format_bytes,
    format_count,
    format_duration,
    format_perplexity,
    memory_metrics,
    meters,
    perplexity,
    replay,
)
from loqt_scale.metrics import events as event_files
from loqt_scale.training.messages import alignment_note, optimizer_words, states_note


def read_lines(folder: Path) -> list[dict]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_json_lines_equal_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.log(step, {"train/loss": 5.0 / step, "train/tokens": 2048 * step})
        writer.log(3, {"eval/loss": 1.25})
    lines = read_lines(tmp_path)
    assert lines[0] == {"step": 1, "train/loss": 5.0, "train/tokens": 2048}
    assert isinstance(lines[0]["train/tokens"], int)
    assert lines[-1] == {"step": 3, "eval/loss": 1.25}
    board = read_board(tmp_path)
    assert set(board) == {"train/loss", "train/tokens", "eval/loss"}
    for tag, events in board.items():
        written = [(line["step"], line[tag]) for line in lines if tag in line]
        assert [step for step, _ in events] == [step for step, _ in written]
        assert [value for _, value in events] == pytest.approx([value for _, value in written], rel=1e-6)  # float32


def same_curves(folder: Path) -> bool:
    """Whether TensorBoard shows what metrics.jsonl holds, each point once."""
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in read_lines(folder):
        for tag, value in line.items():
            if tag != "step":
                wanted.setdefault(tag, []).append((line["step"], pytest.approx(float(value), rel=1e-6)))
    return {tag: points for tag, points in read_board(folder).items() if points} == wanted


def test_a_viewer_sees_the_line_that_is_followed(tmp_path, monkeypatch):
    """After going back, after an evaluation that is made again, and after another line has come back."""
    clock = iter(range(1_700_000_000, 0, -3600))  # set back an hour each time
    monkeypatch.setattr(event_files, "time", SimpleNamespace(time=lambda: float(next(clock))))

    def write(writer: MetricsWriter, steps: range, factor: float) -> None:
        for step in steps:
            writer.log(step, {"train/loss": factor * step})
        writer.log(steps[-1], {"eval/loss": factor})

    with MetricsWriter(tmp_path) as writer:
        write(writer, range(1, 7), 1.0)
    first = (tmp_path / METRICS_FILE).read_bytes()
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert same_curves(tmp_path)
        write(writer, range(3, 6), -1.0)
    assert same_curves(tmp_path)
    with MetricsWriter(tmp_path, resume_step=5, evaluates_again=True) as writer:
        assert same_curves(tmp_path) and read_board(tmp_path)["eval/loss"] == []
        writer.log(5, {"eval/loss": -1.0})
    assert same_curves(tmp_path)
    (tmp_path / METRICS_FILE).write_bytes(first + b'{"step": 7, "train/lo')
    replay(tmp_path)
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        assert same_curves(tmp_path) and len(read_board(tmp_path)["train/loss"]) == 4


def test_non_finite_values_stay_strict_json_and_read_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    (line,) = read_lines(tmp_path)
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    assert math.isnan(float(line["a"])) and float(line["c"]) == -math.inf


def test_each_line_is_on_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"a": 1.0})
        assert len(read_lines(tmp_path)) == 1


def test_a_second_writer_appends_and_tensors_are_read(tmp_path):
    for step in (1, 2):
        with MetricsWriter(tmp_path) as writer:
            writer.log(step, {"a": torch.tensor(0.5)})  # type: ignore[dict-item]
    assert read_lines(tmp_path) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.5}]


def test_disabled_writer_leaves_no_trace(tmp_path):
    with MetricsWriter(tmp_path / "absent", enabled=False) as writer:
        writer.log(1, {"a": 1.0})
    assert not list(tmp_path.iterdir())


def test_close_twice_and_reserved_name(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="called 'step'"):
        writer.log(1, {"step": 1.0})
    writer.close()
    writer.close()
    writer.log(2, {"a": 1.0})
    assert read_lines(tmp_path) == []


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        MetricsWriter(tmp_path)
    assert not (tmp_path / METRICS_FILE).exists()


@pytest.mark.parametrize(("steps", "most"), [(300, 21), (7, 7), (10_000, 21), (1, 1)])
def test_plain_progress_is_short_and_ends_with_the_last_step(capsys, steps, most):
    with Progress(steps, mode="off") as progress:
        for step in range(1, steps + 1):
            progress.update(step, loss=2.0, tokens_per_second=12_345.0)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= most
    assert lines[0].startswith(f"step 1/{steps}  loss 2.0000  ppl 7.39  12.3k tok/s  eta ")
    assert lines[-1].startswith(f"step {steps}/{steps}  ") and lines[-1].endswith("eta 0s")


def test_progress_keeps_the_last_loss_and_prints_lines(capsys):
    with Progress(2, mode="off") as progress:
        progress.update(1, loss=1.0)
        progress.line("merge 1: …")
        progress.update(2)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "merge 1: …"
    assert "loss 1.0000" in out[2]


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_disabled_progress_is_silent(capsys, mode):
    with Progress(2, enabled=False, mode=mode) as progress:
        progress.update(1, loss=1.0)
        progress.line("no")
    assert capsys.readouterr() == ("", "")


def test_bar_goes_to_stderr_and_lines_to_stdout(capsys):
    with Progress(3, mode="on") as progress:
        progress.update(1, loss=1.0, tokens_per_second=1.0)
        progress.line("merge 1")
        progress.update(3, loss=1.0, tokens_per_second=1.0)
    captured = capsys.readouterr()
    assert captured.out == "merge 1\n"
    assert "3/3" in captured.err and "ppl 2.72" in captured.err


def test_auto_asks_the_terminal(capsys, monkeypatch):
    Progress(1, mode="auto").line("plain")
    assert capsys.readouterr() == ("plain\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(1, mode="auto") as progress:
        progress.update(1, loss=1.0)
    assert "1/1" in capsys.readouterr().err


def test_rates_over_a_window_without_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    meter = RateMeter(window=2)
    assert (meter.tokens_per_second, meter.seconds_per_step) == (0.0, 0.0)
    for seconds in (100.0, 1.0, 3.0):  # the first leaves the window
        clock[0] += seconds
        with meter.paused():
            clock[0] += 50.0
        meter.tick(tokens=8)
    assert meter.seconds_per_step == 2.0
    assert meter.tokens_per_second == 4.0


def test_rate_meter_refuses_an_empty_window():
    with pytest.raises(ValueError, match="write 1 or more"):
        RateMeter(window=0)


def test_memory_on_cpu():
    metrics = memory_metrics("cpu")
    assert set(metrics) == {"memory/max_rss_bytes"}
    assert metrics["memory/max_rss_bytes"] > 50 * 2**20  # torch alone is more: catches KiB taken for bytes
    assert metrics == memory_metrics(torch.device("cpu")) or memory_metrics("cpu")["memory/max_rss_bytes"] > 0


def test_memory_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4)
    metrics = memory_metrics("cuda:0")
    assert (metrics["memory/max_allocated_bytes"], metrics["memory/reserved_bytes"]) == (3, 4)


def test_numbers_for_people():
    counts = [0, 7, 950, 999.7, 12_345, 123_456, 1_500_000, 2.5e9, math.inf]
    assert [format_count(value) for value in counts] == ["0", "7", "950", "1k", "12.3k", "123k", "1.5M", "2.5G", "inf"]
    assert [format_bytes(value) for value in (512, 1536, 3 * 2**30)] == ["512 B", "1.50 KiB", "3.00 GiB"]
    durations = [0.4, 42, 59.6, 185, 3725, 90_000 + 3600 * 2, math.inf]
    assert [format_duration(value) for value in durations] == ["0s", "42s", "1m00s", "3m05s", "1h02m", "1d03h", "?"]
    assert perplexity(1e9) == math.inf and perplexity(0.0) == 1.0
    assert [format_perplexity(value) for value in (3.5, 10.0, 1e9)] == ["33.12", "2.2e+04", "inf"]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_time_left_counts_from_the_first_step_that_is_reported(capsys, monkeypatch, mode):
    """After a resume at step 900: nothing of the 900 seconds before it, of them or of this process' start."""
    clock = [0.0]
    monkeypatch.setattr("loqt_scale.metrics.progress.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with Progress(1000, mode=mode, initial_step=900) as progress:
        clock[0] = 900.0
        for step in range(901, 951):
            progress.update(step, loss=1.0)
            clock[0] += 2.0
    captured = capsys.readouterr()
    if mode == "off":
        lines = captured.out.splitlines()
        assert lines[0].endswith("eta ?") and lines[-1].startswith("step 950/1000") and lines[-1].endswith("eta 1m40s")
    else:
        assert "950/1000 [01:38<01:40" in captured.err


@pytest.mark.parametrize(
    ("words", "device", "said"),
    [
        (["--model.dtype=bfloat16"], "cuda", True),
        (["--model.dtype=bfloat16"], "cpu", False),
        (["--model.dtype=bfloat16", "--model.compile=true"], "cuda", False),
        ([], "cuda", False),
    ],
)
def test_widths_that_a_gpu_is_slow_with_are_said(words: list[str], device: str, said: bool) -> None:
    config = parse_run_config(words)
    assert alignment_note([2048, 5464], config.model, device_type=device) == []
    lines = alignment_note([2048, 5461], config.model, device_type=device)
    assert bool(lines) == said and all("5461" in line and "5464" in line for line in lines)


def test_moments_that_stay_float32_are_told() -> None:
    """298 values make two blocks, 257 none, and blocks of a few would not pay."""
    eight_bits = OptimConfig(states="int8")
    assert states_note([64, 64, 257], OptimConfig()) == states_note([64, 48, 298, 5472], eight_bits) == []
    assert "1 of 3 linears have rows of 257 values" in states_note([64, 64, 257], eight_bits)[0]


def test_the_optimizer_is_named() -> None:
    """`--method full` after a config with Muon takes Muon, too."""
    lean = OptimConfig(name="muon", momentum=0.9, states="int8", per_layer=True, clip_norm=0.0)
    muon = "Muon (momentum 0.9), AdamW for embeddings, norms, head; int8 states; updates inside the backward pass"
    assert (optimizer_words(OptimConfig()), optimizer_words(lean)) == ("AdamW", muon)
    assert optimizer_words(OptimConfig(states="int8", compile=True)) == "AdamW; int8 states; compiled updates"
