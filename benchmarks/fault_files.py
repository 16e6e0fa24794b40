"""Faults of the campaign that lie in a run's files: damage, forgery, strays, numbers that are none."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_bench import STEPS, Bench, require, saved_run
from fault_table import fault

# ---- damage and forgery ----------------------------------------------------------------------------------------------


@fault("damaged file", "bytes of a checkpoint's file flipped, cut off or gone")
def damaged(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    path = bench.rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    whole = path.read_bytes()
    how = bench.rng.choice(["flip", "cut", "gone", "longer"])
    bench.say(f"{how} {path.relative_to(checkpoint)}")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(harm(whole, how, bench.rng))
    bench.check_refused(bench.start())
    path.write_bytes(whole)
    bench.go_on()
    bench.check_whole()


def harm(whole: bytes, how: str, rng: random.Random) -> bytes:
    """The bytes, one bit of them turned, some cut off, or some more."""
    if how == "flip" and whole:
        place = rng.randrange(len(whole))
        return whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
    return whole[: rng.randrange(len(whole))] if how == "cut" and whole else whole + b"\0"


@fault("damaged file", "an entry of the tokenized text's cache")
def damaged_cache(bench: Bench) -> None:
    if bench.rng.random() < 0.5:
        bench.train_until(3)
    else:
        bench.end(bench.start("--train.steps=1", f"--train.run_dir={bench.folder / 'other'}"))
    files = sorted(path for path in bench.cache.rglob("*") if path.is_file() and path.stat().st_size)
    require(files != [], "nothing is cached")
    path, how = bench.rng.choice(files), bench.rng.choice(["flip", "cut", "longer", "gone"])
    before = path.stat()
    bench.say(f"{how} {path.name} of the cache")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes(), how, bench.rng))
        if bench.rng.random() < 0.5:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    bench.go_on()
    bench.check_whole()


@fault("damaged file", "the run's metrics.jsonl or config.yaml")
def damaged_records(bench: Bench) -> None:
    bench.train_until(bench.rng.randint(3, STEPS - 3))
    name = bench.rng.choice(["metrics.jsonl", "config.yaml"])
    path, how = bench.run_dir / name, bench.rng.choice(["a torn last line", "empty"])
    if name == "metrics.jsonl":
        how = "a torn last line"
    bench.say(f"{name}: {how}")
    path.write_bytes(path.read_bytes() + b'{"step": 9, "train/lo' if how == "a torn last line" else b"")
    bench.go_on()
    bench.check_whole()


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 3, 10**7, 2**63, 2**70, 1e308, float("nan"), float("inf"), "", "3", "../../etc/passwd",
    "/etc/passwd", "\0", "é" * 300, [], {}, [[]], [None], {"a": "b"}, [[10**7, 10**7], "float32"], [[-1], "float32"],
    [[64, 64], "save"],
    [[320, 64], "float64"], [["64"], "float32"], [[64], ["float32"]], {"../outside": "0" * 64}, "step-00000002",
]  # fmt: skip


# a plausible value of these is believed: nothing else in a checkpoint says what it should be
BELIEVED = ("updates ", "tokens ", "eval_before ", "skipped_in_a_row ", "merge_is_due ", "world_size ", "strategy ")


OPTIONAL = ("sizes",)  # checkpoints of before have none


def hostile_change(manifest: dict[str, Any], rng: random.Random) -> str:
    """Changes one field, or one entry of one, of a manifest as a stranger might; says which."""
    key, value = rng.choice(sorted(manifest.keys() - {"sha256"})), rng.choice(HOSTILE)
    inner = manifest[key]
    if isinstance(inner, dict) and inner and rng.random() < 0.7:
        name = rng.choice(sorted(inner))
        if rng.random() < 0.3:
            inner[rng.choice(["../" + name, "/" + name, "", name + "x", "model..", "a\0b"])] = inner.pop(name)
            return f"{key}: {name} is called otherwise"
        inner[name] = value
        return f"{key}[{name}] = {value!r:.60}"
    if rng.random() < 0.15 and key not in OPTIONAL:
        del manifest[key]
        return f"{key} is gone"
    manifest[key] = value
    return f"{key} = {value!r:.60}"


def forge(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with a checksum that is right."""
    tree = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(tree | {"sha256": digest}, indent=1) + "\n")


@fault("forged manifest", "a random field, the checksum made right; training goes on", known=True)
def forged(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    whole = (checkpoint / "manifest.json").read_bytes()
    manifest = json.loads(whole)
    what = hostile_change(manifest, bench.rng)
    bench.say(f"forged: {what}")
    forge(checkpoint, manifest)
    job = bench.start()
    if what.startswith(BELIEVED):
        statuses = bench.end(job)
        require(set(statuses) in ({0}, {2}), f"ended with {statuses}: {job.output()[-400:]}")
        if set(statuses) == {0}:
            return
    else:
        bench.check_refused(job)
    (checkpoint / "manifest.json").write_bytes(whole)
    bench.go_on()
    bench.check_whole()


@fault("forged manifest", "a random field, the checksum made right; eval, export, generate", known=True)
def forged_reading(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    whole = (checkpoint / "manifest.json").read_bytes()
    for _ in range(4):
        manifest = json.loads(whole)
        what = hostile_change(manifest, bench.rng)
        forge(checkpoint, manifest)
        bench.say(f"forged: {what}")
        status, output = bench.command(*reading(bench, checkpoint))
        require(status in (0, 2), f"{what}: status {status}: {output[-400:]}")
        require(
            status == 2 or what.startswith((*BELIEVED, "step = ")),
            f"{what}: read as if nothing were wrong: {output[-300:]}",
        )
    (checkpoint / "manifest.json").write_bytes(whole)
    bench.go_on()
    bench.check_whole()


def reading(bench: Bench, checkpoint: Path) -> list[str]:
    """A command that reads a checkpoint."""
    number = len(list(bench.folder.glob("export-*")))
    return bench.rng.choice(
        [
            ["eval", "--checkpoint", str(checkpoint), "--data.cache_dir", str(bench.cache), "--train.device=cpu"],
            ["export", "--checkpoint", str(checkpoint), "--out", str(bench.folder / f"export-{number}")],
            ["generate", "--checkpoint", str(checkpoint), "--max_new_tokens", "3", "--prompt", "The"],
        ]
    )


# ---- what does not belong there --------------------------------------------------------------------------------------


def add_strays(bench: Bench) -> None:
    """Puts things that are no checkpoints beside the checkpoints."""
    root = bench.run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    names = ["step-1", "step-²", "step-000000030", "step-00000099", "step-", "step-0000000x", "step-00000002 (copy)"]
    for name in bench.rng.sample(names, 3):
        (root / name).mkdir(exist_ok=True)
    (root / bench.rng.choice(["step-00000007.tar", "step-3", ".step-00000001.partial.swp", "notes.txt"])).write_text(
        "?"
    )
    (root / ".step-00000005.partial").mkdir(exist_ok=True)
    bench.say(f"beside the checkpoints: {sorted(path.name for path in root.iterdir())}")


@fault("stray folder", "step-1, step-² and the like beside the checkpoints", known=True)
def strays(bench: Bench) -> None:
    keep = f"--checkpoint.keep_last={bench.rng.randint(1, 2)}"
    if bench.rng.random() < 0.5:
        add_strays(bench)
    bench.train_until(4, keep)
    add_strays(bench)
    bench.go_on(keep)
    bench.check_whole()
    bench.check_again()


@fault("unlisted file", "safetensors, links and programs that a checkpoint's manifest does not list", known=True)
def unlisted(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    status, output = bench.command(*reading_eval(bench, checkpoint))
    require(status == 0, f"eval of a sound checkpoint: {status}: {output[-300:]}")
    kinds = sorted(UNLISTED)
    for what in kinds:
        bench.say(f"added: {what}")
        UNLISTED[what](bench, checkpoint)
        check_unread(bench, checkpoint, output)
        remove_unlisted(checkpoint)
    UNLISTED[bench.rng.choice(kinds)](bench, checkpoint)
    job = bench.start()
    statuses = bench.end(job)
    require(set(statuses) in ({0}, {2}), f"ended with {statuses}: {job.output()[-400:]}")
    if set(statuses) == {2}:
        remove_unlisted(checkpoint)
        bench.go_on()
    bench.check_whole()


SECRET = "the content of a linked secret"


def _fives() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"model.model.norm.weight": torch.full((64,), 5.0)})


def _linked_secret(bench: Bench, checkpoint: Path) -> None:
    secret = bench.folder / "secret.txt"
    secret.write_text(SECRET)
    names = ["special_tokens_map.json", "chat_template.jinja", "generation_config.json", "added_tokens.json"]
    (checkpoint / "huggingface" / bench.rng.choice(names)).symlink_to(secret)


UNLISTED: dict[str, Callable[[Bench, Path], object]] = {
    "a tensor file": lambda bench, folder: (folder / "anything.safetensors").write_bytes(_fives()),
    "one more shard": lambda bench, folder: (folder / "shard-00009-model-00001-of-00001.safetensors").write_bytes(
        _fives()
    ),
    "a model": lambda bench, folder: (folder / "huggingface" / "model.safetensors").write_bytes(_fives()),
    "a link to a secret": _linked_secret,
    "a program": lambda bench, folder: (folder / "huggingface" / "modeling_evil.py").write_text(
        "raise SystemExit(77)\n"
    ),
    "a linked folder": lambda bench, folder: (folder / "more").symlink_to(bench.folder / "logs-0"),
}


def check_unread(bench: Bench, checkpoint: Path, before: str) -> None:
    """Raises Bad unless eval and export refuse a checkpoint, or do as if what is not listed were not there."""
    status, output = bench.command(*reading_eval(bench, checkpoint))
    loss = [line for line in before.splitlines() if "loss" in line]
    require(status == 2 or (status == 0 and loss[0] in output), f"eval: status {status}: {output[-400:]}")
    exported = bench.folder / "exported"
    status, output = bench.command(*reading_export(bench, checkpoint))
    require(status in (0, 2), f"export: status {status}: {output[-400:]}")
    check_norm_unread(exported)
    copied = [path for path in exported.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    require(not copied, f"the secret was copied to {copied}")
    shutil.rmtree(exported, ignore_errors=True)


def check_norm_unread(exported: Path) -> None:
    """Raises Bad if an export holds the norm of fives that an unlisted file has put in its way."""
    from safetensors.torch import load_file

    for path in exported.rglob("*.safetensors"):
        norms = [tensor for name, tensor in load_file(path).items() if name.endswith("model.norm.weight")]
        require(not any(bool((norm == 5).all()) for norm in norms), "an unlisted file's tensor was exported")


def remove_unlisted(checkpoint: Path) -> None:
    """Removes from a checkpoint what its manifest does not list."""
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"].keys() | {"manifest.json"}
    for path in sorted(checkpoint.rglob("*"), reverse=True):
        if (path.is_symlink() or path.is_file()) and path.relative_to(checkpoint).as_posix() not in listed:
            path.unlink()


@fault("unlisted file", "a listed file is a link to one with the same content elsewhere")
def listed_link(bench: Bench) -> None:
    checkpoint = saved_run(bench)
    path = bench.rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    bench.say(f"{path.relative_to(checkpoint)} is a link")
    path.rename(bench.folder / "elsewhere")
    path.symlink_to(bench.folder / "elsewhere")
    bench.check_refused(bench.start())
    path.unlink()
    (bench.folder / "elsewhere").rename(path)
    bench.go_on()
    bench.check_whole()


@fault("not finite", "NaN or infinity in a tensor, checksums made right")
def not_finite(bench: Bench) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = saved_run(bench)
    path = bench.rng.choice(sorted(checkpoint.glob("shard-*.safetensors")))
    tensors, metadata = load_file(path), header(path)
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
    name = bench.rng.choice([n for n in floats if n.startswith("model.")])
    tensors[name].view(-1)[bench.rng.randrange(tensors[name].numel())] = bench.rng.choice([torch.nan, torch.inf])
    save_file(tensors, path, metadata=metadata)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= {path.name: listing(manifest["files"][path.name], path)}
    forge(checkpoint, manifest)
    bench.say(f"not finite: {name}")
    for words in (reading_export(bench, checkpoint), reading_eval(bench, checkpoint)):
        status, output = bench.command(*words)
        require(status == 2, f"{words[0]}: status {status}: {output[-300:]}")
        require(name.removeprefix("model.") in output, f"{words[0]} does not name {name}: {output[-300:]}")


def header(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file."""
    with path.open("rb") as file:
        found = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return found  # type: ignore[no-any-return]


def listing(old: Any, path: Path) -> Any:
    """What a manifest says of a file, in the form that it has for it already."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if isinstance(old, str):
        return digest
    if isinstance(old, dict):
        return {key: path.stat().st_size if isinstance(value, int) else digest for key, value in old.items()}
    return [path.stat().st_size if isinstance(value, int) else digest for value in old]


def reading_export(bench: Bench, checkpoint: Path) -> list[str]:
    """The export command."""
    return ["export", "--checkpoint", str(checkpoint), "--out", str(bench.folder / "exported")]


def reading_eval(bench: Bench, checkpoint: Path) -> list[str]:
    """The eval command."""
    return ["eval", "--checkpoint", str(checkpoint), "--data.cache_dir", str(bench.cache), "--train.device=cpu"]
