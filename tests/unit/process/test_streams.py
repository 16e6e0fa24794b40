"""A command whose work is what it prints: nobody reads it, or its disk is full."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

import pytest

from loqt_scale import cli

Broken = Callable[[], AbstractContextManager[TextIO]]
WORDS = [
    ["train", "--print_config"],
    ["train", "--help"],
    ["plan", "--help"],
    ["--help"],
    ["probe", "10", ""],
    ["probe", "10", "flush"],
    ["probe", "20000", ""],
]


def _probe(argv: list[str], prog: str) -> None:
    """Prints as `plan` does, or as generated text is printed: at once."""
    print("x" * int(argv[0]), flush=bool(argv[1]))


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(run=_probe, summary=""))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def nobody_reads() -> Iterator[TextIO]:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w") as stream:
        yield stream


@contextmanager
def closed() -> Iterator[TextIO]:
    """As `entry` makes one of a standard output that the process was started without."""
    stream = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    yield stream
    stream.close()


def status_of(words: list[str]) -> int | str | None:
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_reader_that_has_gone_ends_it_quietly(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_reads() as stream, redirect_stdout(stream):  # closing the stream would fail if anything waited there
        assert status_of(words) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("broken", "why"),
    [(full_disk, "(No space left on device); make room"), (closed, "(Bad file descriptor); let it")],
)
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_one_that_cannot_be_written_to_is_one_line(
    words: list[str], broken: Broken, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with broken() as stream, redirect_stdout(stream):
        assert status_of(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"standard output cannot be written to {why}" in line


@pytest.mark.parametrize(
    ("words", "streams", "status", "out", "err"),
    [
        (["train", "--print_config"], ">&-", 2, "", "standard output cannot be written to (Bad file descriptor)"),
        (["train", "--loqt.rank=0"], ">&- <&-", 2, "", "error: loqt.rank is 0"),
        (["train", "--loqt.rank=0"], "2>&-", 2, "", ""),
    ],
)
def test_a_process_without_standard_streams(words: list[str], streams: str, status: int, out: str, err: str) -> None:
    code = "import sys; from loqt_scale.entry import main; sys.exit(main())"
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == status and done.stdout == out and err in done.stderr
    assert done.stderr.count("\n") == (1 if err else 0)


def test_ranks_that_do_not_reach_one_another_are_told_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(argv: list[str], prog: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(run=away, summary=""))
    assert cli.main(["probe"]) == 2
    assert "the ranks do not reach one another" in capsys.readouterr().err


def test_standard_error_that_is_closed_hides_no_status() -> None:
    """Of an unbuffered stream, as stderr nearly is."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = io.TextIOWrapper(os.fdopen(write_end, "wb", buffering=0), write_through=True)
    with redirect_stderr(stream):
        assert cli.main(["train", "--loqt.rank", "0"]) == 2
