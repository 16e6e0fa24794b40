"""Faults of the campaign: links, other disks, ranks that see other files."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from fault_bench import Bench, mount, require
from fault_table import SEVERAL, fault

# ---- folders that are elsewhere --------------------------------------------------------------------------------------


def moved_and_linked(path: Path, elsewhere: Path) -> None:
    """Moves a folder and leaves a symbolic link to it."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere, target_is_directory=True)


@fault("link", "checkpoints/ moved to another disk and linked", known=True)
def linked_checkpoints(bench: Bench) -> None:
    if bench.rng.random() < 0.5:
        bench.run_dir.mkdir()
        (bench.folder / "other disk").mkdir()
        (bench.run_dir / "checkpoints").symlink_to(bench.folder / "other disk", target_is_directory=True)
        bench.train_until(4)
    else:
        bench.train_until(4)
        moved_and_linked(bench.run_dir / "checkpoints", bench.folder / "other disk")
    if bench.rng.random() < 0.5:
        bench.train_until(8)
    bench.go_on()
    require((bench.run_dir / "checkpoints").is_symlink(), "the link is gone")
    bench.check_whole()
    bench.check_again()


@fault("link", "the run folder is a link, or spelled otherwise")
def other_spelling(bench: Bench) -> None:
    here, name = bench.run_dir.parent, bench.run_dir.name
    link = bench.folder / "linked"
    link.symlink_to(bench.run_dir, target_is_directory=True)
    plain = [str(link), f"{bench.run_dir}/", f"{here}/./{name}", f"{bench.run_dir}/../{name}", name]
    check_spelling(bench, bench.rng.choice([*plain, f"$HERE/{name}", f"${{HERE}}/{name}"]))


@fault("link", "the run folder is written with ~", known=True)
def tilde(bench: Bench) -> None:
    check_spelling(bench, f"~/{bench.run_dir.name}")


def check_spelling(bench: Bench, spelled: str) -> None:
    """A run goes on in its folder however that is called, and no folder is made that is called like a variable."""
    here = bench.run_dir.parent

    def prepare(rank: int) -> None:
        os.chdir(here)
        os.environ["HOME"] = os.environ["HERE"] = str(here)

    bench.train_until(4)
    bench.say(f"the folder is now {spelled.replace(str(here), '...')}")
    bench.go_on(f"--train.run_dir={spelled}", prepare=prepare)
    bench.check_whole()
    strange = [path.name for path in here.iterdir() if path.name[0] in "~$"]
    require(not strange, f"folders named {strange} were made")


@fault("link", "a step's folder is a link")
def linked_step(bench: Bench) -> None:
    bench.train_until(bench.rng.randint(3, 8))
    latest = bench.latest()
    assert latest is not None
    moved_and_linked(latest, bench.folder / latest.name)
    bench.go_on(f"--checkpoint.keep_last={bench.rng.randint(1, 3)}")
    bench.check_whole()


@fault("link", "checkpoints/ is another file system")
def mounted_checkpoints(bench: Bench) -> None:
    (bench.run_dir / "checkpoints").mkdir(parents=True)
    if not mount(bench, "-t", "tmpfs", "-o", "size=64m", "tmpfs", at=bench.run_dir / "checkpoints"):
        return linked_checkpoints(bench)
    bench.train_until(4)
    bench.go_on()
    bench.check_whole()
    bench.check_again()


# ---- ranks that do not fit together ----------------------------------------------------------------------------------


@fault("foreign rank", "reads another text", SEVERAL, known=True)
def other_text(bench: Bench) -> None:
    odd, text = bench.rng.randrange(bench.ranks), bench.text.read_text()
    where, position = nodes(bench), bench.rng.randrange(len(text) // 2, len(text) - 1)
    for rank, folder in enumerate(where):
        (folder / "text.txt").write_text(text[:position] + "~" + text[position + 1 :] if rank == odd else text)
    bench.say(f"rank {odd} reads a text with another character at {position}")
    own_cache = ["--data.cache_dir=cache"] if bench.rng.random() < 0.5 else []
    settings = ['--data.files=["text.txt"]', "--parallel.timeout_seconds=30", *own_cache]
    all_good = lambda rank: os.chdir(where[1 - odd])  # noqa: E731
    if bench.rng.random() < 0.5:
        bench.train_until(3, *settings, prepare=all_good)
    job = bench.start(*settings, prepare=lambda rank: os.chdir(where[rank]))
    bench.check_refused(job, seconds=100)
    bench.go_on(*settings, prepare=all_good)
    bench.check_whole()


def nodes(bench: Bench) -> list[Path]:
    """A working directory for each rank, as if it were another machine's."""
    folders = [bench.folder / f"node-{rank}" for rank in range(bench.ranks)]
    for folder in folders:
        folder.mkdir()
    return folders


@fault("foreign rank", "has other settings", SEVERAL)
def other_settings(bench: Bench) -> None:
    odd = bench.rng.randrange(bench.ranks)
    key, value = bench.rng.choice(
        [
            ("train.seed", "3"),
            ("optim.lr", "6e-3"),
            ("loqt.merge.gap", "5"),
            ("loqt.rank", "16"),
            ("data.seq_len", "16"),
        ]
    )
    bench.say(f"rank {odd} has {key} {value}")
    words = lambda rank: bench.words("--parallel.timeout_seconds=30", *([f"--{key}={value}"] if rank == odd else []))  # noqa: E731
    if bench.rng.random() < 0.5:
        bench.train_until(3)
    bench.check_refused(bench.start(words=words), seconds=100, about=[key.rpartition(".")[2]])
    bench.go_on()
    bench.check_whole()


@fault("foreign rank", "has no such file", SEVERAL)
def missing_file(bench: Bench) -> None:
    odd = bench.rng.randrange(bench.ranks)
    where = nodes(bench)
    for rank, folder in enumerate(where):
        if rank != odd:
            shutil.copy(bench.text, folder / "text.txt")
    bench.say(f"rank {odd} has no text")
    settings = ['--data.files=["text.txt"]', "--parallel.timeout_seconds=120"]
    job = bench.start(*settings, prepare=lambda rank: os.chdir(where[rank]))
    began = time.monotonic()
    bench.check_refused(job, about=["text.txt"])
    require(time.monotonic() - began < 60, "the other ranks waited for one that had failed at the start")
    bench.go_on()
    bench.check_whole()


@fault("foreign rank", "rank 0 cannot make the run folder")
def blocked_folder(bench: Bench) -> None:
    (bench.folder / "file").write_text("in the way")
    job = bench.start(f"--train.run_dir={bench.folder / 'file' / 'run'}", "--parallel.timeout_seconds=120")
    began = time.monotonic()
    bench.check_refused(job, about=["run_dir"])
    require(time.monotonic() - began < 60, "the other ranks waited for one that had failed at the start")
    bench.go_on()
    bench.check_whole()
