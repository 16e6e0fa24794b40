"""Tokens/s of reading text on one core, against what training would need; local files, and many streams on one rank.

    python benchmarks/reading.py TEXT.txt [--megabytes 16] [--streams 8] [--gpu-flops 4e14] [--tables streamed]

    python benchmarks/reading.py TEXT.txt --megabytes 64 --tables workers --workers 1 2 [--publish]    # idle machine
    python benchmarks/reading.py TEXT.txt --megabytes 64 --tables ranks --streams 24 --steps 20000 [--publish]

The text is cut at blank lines into documents. Seconds are those of processors, all threads and processes together, so
that what else runs on the machine hardly counts; three tables by default, and two to be asked for:

    streamed   JSONL and parquet files as a run reads them: logical streams, shuffled, tokenized, packed
    streams    what many logical streams on one rank take: threads, open files, memory, seconds to the first batch
    local      bytes/s of reading files alone, of tokenizing them, peak memory at two sizes, and 100 GB from their slope
    workers    tokenizing local files by one process, two, ...: here seconds are those of the clock, in turns
    ranks      what each of 1, 2, 3 and 4 ranks reads of a streamed data set, and that its sequences are the same

What is needed: eight GPUs that train the paper's 1b shape, 6 N FLOPs a token with its 1.34e9 weights, at `--gpu-flops`
of useful work a second on each (default: an H100 at 40 % of its dense bfloat16 peak).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import publish, table

from loqt_scale.config import DataConfig
from loqt_scale.data import build_corpus, token_store, tokenizing
from loqt_scale.data.corpora import files_text
from loqt_scale.data.tokenizers import load_tokenizer, train_bpe

WEIGHTS_1B, GPUS, SEQ_LEN, BATCH, VOCABULARY = 1.34e9, 8, 256, 64, 32_000


def documents(path: Path, megabytes: float) -> list[str]:
    """The first documents of a text file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(int(megabytes * 1e6))
    return [block for block in text.split("\n\n") if block.strip()]


def json_lines(rows: list[str]) -> str:
    """One object a line."""
    return "".join(json.dumps({"text": text}) + "\n" for text in rows)


def write_sets(rows: list[str], folder: Path, files: int) -> dict[str, Path]:
    """The same documents as a folder of JSONL files and as one of parquet files."""
    sets = {kind: folder / kind for kind in ("jsonl", "parquet")}
    for path in sets.values():
        path.mkdir(parents=True)
    parts = {f"train-{number:03d}": rows[number::files] for number in range(files)} | {"validation": rows[:20]}
    for name, part in parts.items():
        (sets["jsonl"] / f"{name}.jsonl").write_text(json_lines(part), encoding="utf-8")
        pq.write_table(pa.table({"text": part}), sets["parquet"] / f"{name}.parquet")
    return sets


def in_a_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a task where nothing has been allocated before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


# ---- streamed --------------------------------------------------------------------------------------------------------


def tokens_per_second(folder: Path, tokenizer: str, streams: int, seconds: float) -> float:
    """What the trainer can take of a data set's sequences."""
    config = DataConfig(dataset=str(folder), tokenizer=tokenizer, seq_len=SEQ_LEN, streams=streams)
    text = build_corpus(config, seed=0, global_batch_size=BATCH).train
    text.sequences(0, 0, BATCH)  # opens files, imports
    step, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        step += 1
        text.sequences(step, 0, BATCH)
    text.close()  # type: ignore[attr-defined]
    return step * BATCH * SEQ_LEN / (time.process_time() - begin)


def many_streams(folder: Path, streams: int) -> str:
    """What so many logical streams on one rank take, 8 seconds after their first batch."""
    config = DataConfig(dataset=str(folder), tokenizer="bytes", seq_len=SEQ_LEN, streams=streams)
    text = build_corpus(config, seed=0, global_batch_size=streams).train
    this = psutil.Process()
    before, begin = this.memory_info().rss, time.perf_counter()
    text.sequences(0, 0, streams)
    first = time.perf_counter() - begin
    files = sum(str(file.path).startswith(str(folder)) for file in this.open_files())
    time.sleep(8)
    threads = sum(thread.name == "data-stream" for thread in threading.enumerate())
    memory = (this.memory_info().rss - before) / 1e6
    text.close()  # type: ignore[attr-defined]
    return f"{threads:3} threads, {files:4} open files, {memory:6.0f} MB, first batch after {first:.1f} s"


# ---- local -----------------------------------------------------------------------------------------------------------


def read_alone(path: Path) -> float:
    """MB of text a second that are read of a file and cut into documents."""
    begin, size = time.process_time(), 0
    for document in files_text([str(path)], "text").documents():
        size += len(document)
    return size / 1e6 / (time.process_time() - begin)


def tokenize(path: Path, tokenizer: str, processes: int) -> tuple[float, float, int, float]:
    """Seconds, peak MB of this process, bytes of the tokens of a file, and seconds by the clock."""
    tokenizing.processes_for = lambda size: processes  # type: ignore[assignment]
    loaded, begin, started = load_tokenizer(tokenizer), _seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        text = files_text([str(path)], "text")
        store = token_store.tokenized(text, loaded, eval_fraction=0.02, cache_dir=Path(cache))
        taken, seconds = time.perf_counter() - started, _seconds() - begin
        written = store.train.nbytes + store.eval.nbytes
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # ru_maxrss would be the parent's, if that is larger
    return seconds, int(status["VmHWM"].split()[0]) / 1e3, written, taken


def _seconds() -> float:
    """Of processors, of this process and those that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_local(rows: list[str], folder: Path, tokenizer: str, processes: int) -> None:
    """The table of local files."""
    write_kinds(rows, folder)
    for path in sorted(folder.glob("read.*")):
        size, rate = path.stat().st_size / 1e6, read_alone(path)
        print(f"reading alone, {path.name[5:]:10} {size:6.1f} MB: {rate:6.1f} MB of text/s", flush=True)
    runs = {}
    for share in (3, 1):
        path = folder / f"a{share}.txt"
        path.write_text("\n\n".join(rows[: len(rows) // share]), encoding="utf-8")
        seconds, peak, written, _ = in_a_process(tokenize, path, tokenizer, processes)
        runs[share] = (path.stat().st_size / 1e6, seconds, written / 1e6)
        print(f"tokenizing {runs[share][0]:6.1f} MB, {processes} processes: {seconds:6.1f} s, peak {peak:.0f} MB")
    (small, soon, few), (large, late, many) = runs[3], runs[1]
    rate = (large - small) / (late - soon)
    tokens = 100 * (many - few) / (large - small)
    print(f"slope: {rate:.2f} MB/s; 100 GB of text: {1e5 / rate / 3600:.1f} h of one core, {tokens:.0f} GB of tokens")


def print_workers(rows: list[str], folder: Path, tokenizer: str, options: argparse.Namespace) -> None:
    """The table of tokenizing by several processes, from the slope of two sizes: starting them is not in it."""
    from step_time import measured_in_turns  # loads torch, which processes that tokenize do without

    folder.mkdir()
    sizes: dict[int, float] = {}
    for share in (3, 1):
        (folder / f"a{share}.txt").write_text("\n\n".join(rows[: len(rows) // share]), encoding="utf-8")
        sizes[share] = (folder / f"a{share}.txt").stat().st_size / 1e6
    cases = list(product(options.workers, sizes))
    found = measured_in_turns(
        cases, options.repeats, lambda case, _: in_a_process(tokenize, folder / f"a{case[1]}.txt", tokenizer, case[0])
    )
    clock = {case: statistics.median(run[3] for run in runs) for case, runs in found.items()}
    slopes, lines = {}, []
    for workers in options.workers:
        runs = {share: found[workers, share][0] for share in sizes}
        seconds = clock[workers, 1] - clock[workers, 3]
        slopes[workers] = (sizes[1] - sizes[3]) / seconds
        tokens = (runs[1][2] - runs[3][2]) / 2 / seconds  # of two bytes
        hours = 1e5 / slopes[workers] / 3600
        cells = [f"{tokens:,.0f}", f"{slopes[workers]:.2f}", f"{slopes[workers] / slopes[options.workers[0]]:.2f}"]
        lines.append(
            [workers, f"{clock[workers, 1]:.1f}", *cells, f"{hours:.1f}", f"{max(r[1] for r in found[workers, 1]):.0f}"]
        )
    head = ["processes", "seconds, all", "tokens/s", "MB/s", "times the first", "100 GB, hours", "peak MB of who reads"]
    text = (
        f"{table(head, lines)}\n\n{sizes[1]:.0f} MB of text less {sizes[3]:.0f} MB (their slope), by the clock, "
        f"medians of {options.repeats} turns. One process reads and tokenizes alone; more are fed by one that reads."
    )
    publish(
        "Reading: tokenizing by several processes",
        "python benchmarks/reading.py TEXT.txt --tables workers",
        text,
        keep=options.publish,
    )


def write_kinds(rows: list[str], folder: Path) -> None:
    """The same documents in one file of each kind."""
    folder.mkdir()
    (folder / "read.txt").write_text("\n\n".join(rows), encoding="utf-8")
    (folder / "read.jsonl").write_text(json_lines(rows), encoding="utf-8")
    (folder / "read.jsonl.gz").write_bytes(gzip.compress(json_lines(rows).encode(), 6))
    with pa.output_stream(str(folder / "read.jsonl.zst"), compression="zstd") as stream:
        stream.write(json_lines(rows).encode())
    pq.write_table(pa.table({"text": rows}), folder / "read.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--gpu-flops", type=float, default=4e14)
    parser.add_argument("--many", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--processes", type=int, default=1, help="that tokenize local files")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the table of workers")
    parser.add_argument("--repeats", type=int, default=3, help="turns of that table")
    parser.add_argument("--steps", type=int, default=200, help="of the table of ranks")
    parser.add_argument("--publish", action="store_true", help="keep the tables of workers and ranks in RESULTS.md")
    parser.add_argument("--tokenizer", help="a folder; default: a BPE trained on the text")
    parser.add_argument("--tables", nargs="*", default=["streamed", "streams", "local"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), documents(options.text, options.megabytes)
        bpe = options.tokenizer or str(folder / "bpe")
        if options.tokenizer is None:
            train_bpe(rows, VOCABULARY, folder / "bpe")
        sets = write_sets(rows, folder, options.streams)
        if "streamed" in options.tables:
            print_streamed(sets, bpe, options.streams, options.seconds, options.gpu_flops / (6 * WEIGHTS_1B))
        for kind, path in sets.items() if "streams" in options.tables else []:
            for streams in options.many:
                print(f"{streams:4} streams, {kind:8}{in_a_process(many_streams, path, streams)}", flush=True)
        if "workers" in options.tables:
            print_workers(rows, folder / "workers", bpe, options)
        if "ranks" in options.tables:
            print_ranks(sets["jsonl"], options)
        if "local" in options.tables:
            print_local(rows, folder / "local", bpe, options.processes)


def print_ranks(folder: Path, options: argparse.Namespace) -> None:
    """The table of ranks, of a folder of JSON lines; bytes by the kernel's count, one token a byte."""
    from tests.distributed.pool import RankPool  # loads torch

    pool, target = RankPool(), "tests.distributed.stream_tasks:read_share"
    asked: dict[str, Any] = {"folder": str(folder), "steps": options.steps, "batch": options.streams, "timeout": 500.0}
    ((read, tokens, whole),) = pool.run(1, target, **asked)
    lines = [["1", f"{read / 1e6:.1f}", f"{tokens / 1e6:.1f}"]]
    for ranks in (2, 3, 4):
        found = pool.run(ranks, target, **asked)
        parts = [share_[2] for share_ in found]
        each = options.streams // ranks
        steps = range(options.steps)
        joined = [value for step in steps for part in parts for value in part[step * each : (step + 1) * each]]
        assert joined == whole, f"{ranks} ranks read other sequences than one"
        cells = (", ".join(f"{share_[place] / 1e6:.1f}" for share_ in found) for place in (0, 1))
        lines.append([str(ranks), *cells])
    pool.close()
    head = ["ranks", "bytes read by each, MB", "tokens encoded by each, M"]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    text = (
        f"{table(head, lines)}\n\n{options.streams} files of JSON lines, {size:.0f} MB, one token a byte, as many "
        f"logical streams; {options.steps:,} steps of {options.streams} sequences of 64 tokens, and what is read "
        "ahead. The ranks' sequences are those that one rank reads (checked)."
    )
    command = f"python benchmarks/reading.py {options.text.name} --megabytes {options.megabytes:g} --tables ranks"
    command += f" --streams {options.streams} --steps {options.steps}"
    publish("Reading: what each rank reads of a streamed data set", command, text, keep=options.publish)


def print_streamed(sets: dict[str, Path], bpe: str, streams: int, seconds: float, needed: float) -> None:
    """The table of streamed data sets; `needed`: tokens/s of a GPU."""
    print(f"needed: {needed:,.0f} tokens/s a GPU, {GPUS * needed:,.0f} on {GPUS} (6 x {WEIGHTS_1B:.3g} FLOPs a token)")
    for kind, path in sets.items():
        for tokenizer in ("bytes", bpe):
            rate = tokens_per_second(path, tokenizer, streams, seconds)
            share, cores = 100 * needed / rate, math.ceil(GPUS * needed / rate)
            name = "bytes" if tokenizer == "bytes" else "BPE"
            print(f"streamed {kind:8}{name:6}{rate:12,.0f} tokens/s a core: {share:.1f} % of one a GPU, {cores} for "
                  f"{GPUS}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
