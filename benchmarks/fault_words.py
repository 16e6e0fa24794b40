"""Faults of the campaign: settings that cannot be, texts that may not be read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from fault_bench import Bench, is_root, require, saved_run
from fault_table import ALONE, fault

Wrong = Callable[[Bench], list[str]]


def _file(bench: Bench, name: str, content: str | bytes) -> str:
    path = bench.folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _setting(*words: str) -> Wrong:
    return lambda bench: bench.words(*words)


WRONG_SETTINGS: dict[str, Wrong] = {
    "a key that is a list": lambda b: b.words("--config", _file(b, "key.yaml", "? [a, b]\n: c\n")),
    "a file nested too deeply": lambda b: b.words(
        "--config", _file(b, "deep.yaml", "train: " + "[" * 5000 + "]" * 5000)
    ),
    "a file that is no text": lambda b: b.words("--config", _file(b, "binary.yaml", bytes(range(256)))),
    "a scale beyond float32": _setting("--loqt.scale=1e308"),
    "a rate of .inf": _setting("--optim.lr=.inf"),
    "no such activation": _setting("--model.overrides.hidden_act=evil"),
    "a negative width": _setting("--model.overrides.hidden_size=-64"),
    "a dropout of 5": _setting("--model.overrides.attention_dropout=5"),
    "3 heads of 4": _setting("--model.overrides.num_key_value_heads=3"),
    "a padding token beyond the vocabulary": _setting("--model.overrides.pad_token_id=99999"),
    "an override called 1": _setting("--model.overrides.1=2"),
    "a name of 300 letters": lambda b: b.words(f"--train.run_dir={b.folder / ('a' * 300)}"),
    "text of a user who is not there": _setting('--data.files=["~nosuchuser/x.txt"]'),
    "cache of a user who is not there": _setting("--data.cache_dir=~nosuchuser/x"),
    "a run folder of a user who is not there": _setting("--train.run_dir=~nosuchuser/x"),
    "a path of 5000 letters": lambda b: b.words(f'--data.files=["/var/{"a" * 5000}.txt"]'),
    "a null byte in a path": _setting('--data.files=["a\\u0000b.txt"]'),
    "a seed of 2^64": _setting(f"--train.seed={2**64}"),
    "steps that are no number": _setting("--train.steps=many"),
    "memory below zero": lambda b: ["plan", "--model.preset=llama_nano", "--gpu-memory=-5GB"],
    "memory that is no number": lambda b: ["plan", "--model.preset=llama_nano", "--gpu-memory=nanGB"],
    "minus two GPUs": lambda b: ["plan", "--model.preset=llama_nano", "--gpus=-2"],
}

WRONG_READING: dict[str, list[str]] = {
    "a temperature that rounds to 0": ["generate", "--max_new_tokens=4", "--temperature=1e-300"],
    "an infinite temperature": ["generate", "--max_new_tokens=4", "--temperature=.inf"],
    "a generator's seed of 2^64": ["generate", "--max_new_tokens=4", f"--seed={2**64}"],
    "export into a file system that takes none": ["export", "--out=/proc/x"],
    "export below a file": ["export", "--out=TEXT/x"],
}


@fault("wrong words", "settings that cannot be", ALONE, known=True)
def wrong_settings(bench: Bench) -> None:
    for name in WRONG_SETTINGS:
        bench.say(name)
        status, output = bench.command(*WRONG_SETTINGS[name](bench))
        require(status == 2 and "error:" in output, f"{name}: status {status}: {output[-300:]}")
        require(not bench.run_dir.exists(), f"{name}: a run folder was made")


@fault("wrong words", "of eval, export and generate", ALONE, known=True)
def wrong_reading(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    for name, words in WRONG_READING.items():
        bench.say(name)
        filled = [word.replace("TEXT", str(bench.text)) for word in words]
        status, output = bench.command(filled[0], "--checkpoint", str(checkpoint), *filled[1:])
        require(status == 2 and "error:" in output, f"{name}: status {status}: {output[-300:]}")
    status, output = bench.command(
        "generate", "--checkpoint", str(checkpoint), "--max_new_tokens=2", "--prompt=caf\udce9"
    )
    require(status in (0, 2), f"a prompt in Latin-1: status {status}: {output[-300:]}")
    status, output = bench.command(
        "generate", "--checkpoint", str(checkpoint), "--max_new_tokens=2", "--temperature=1e308"
    )
    require(status in (0, 2), f"a temperature of 1e308: status {status}: {output[-300:]}")
    bench.go_on()
    bench.check_whole()


@fault("wrong words", "a text that may not be read", ALONE, known=True)
def unreadable(bench: Bench) -> None:
    if not is_root():
        return
    text = bench.folder / "private.txt"
    shutil.copy(bench.text, text)
    text.chmod(0)
    os.chmod(bench.folder, 0o777)
    _open_parents(bench.folder)

    def nobody(rank: int) -> None:
        os.environ["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    job = bench.start(f'--data.files=["{text}"]', prepare=nobody)
    statuses = bench.end(job)
    require(set(statuses) == {2}, f"ended with {statuses}: {job.output()[-300:]}")
    require("private.txt" in job.output(), f"the file is not named: {job.output()[-300:]}")


def _open_parents(folder: Path) -> None:
    """Lets others pass through the folders that were made for the campaign."""
    made_in = Path(tempfile.gettempdir())
    for path in folder.parents:
        if path.stat().st_uid == os.geteuid() and made_in in path.parents:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)


@fault("wrong words", "a text whose name means something to a library", ALONE, known=True)
def odd_names(bench: Bench) -> None:
    rows = "".join(json.dumps({"text": part}) + "\n" for part in bench.text.read_text().split("\n\n"))
    path = bench.folder / bench.rng.choice(["a::b.jsonl", "a[1].jsonl", "c%20d.jsonl", "e*f.jsonl", "g{h,i}.jsonl"])
    path.write_text(rows)
    bench.say(f"the text is called {path.name}")
    job = bench.start(f"--data.files={json.dumps([str(path)])}", "--train.steps=2")
    statuses = bench.end(job)
    require(set(statuses) in ({0}, {2}), f"ended with {statuses}: {job.output()[-300:]}")
    require(set(statuses) == {0} or path.name in job.output(), f"the file is not named: {job.output()[-300:]}")
