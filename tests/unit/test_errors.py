"""What a person sees of an exception, and where its traceback is kept."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from loqt_scale import cli
from loqt_scale.errors import (
    ConfigError,
    MissingFileError,
    NotAFolderError,
    UnwritableError,
    UserError,
    explained,
    machine_error,
    named,
    reason_of,
    shortened,
)
from loqt_scale.process import error_log
from loqt_scale.process.environment import TRACEBACK


def test_a_librarys_exception_is_explained_and_keeps_its_cause() -> None:
    with (
        pytest.raises(ConfigError, match=r"^the file is bad: KeyError: 'evil'; write another$") as caught,
        explained("the file is bad", "write another", kind=ConfigError),
    ):
        raise KeyError("evil")
    assert isinstance(caught.value.__cause__, KeyError)


def test_user_errors_and_what_is_not_expected_pass() -> None:
    with pytest.raises(MissingFileError, match=r"^as it is$"), explained("what"):
        raise MissingFileError("as it is")
    with pytest.raises(KeyError), explained("what", of=(OSError,)):
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), explained("what"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one\n  two"), "one two"),
        (ValueError(), "ValueError"),
        (AssertionError(), "AssertionError"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (PermissionError(13, "Permission denied", "/a/b"), "Permission denied: /a/b"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("plain"), "plain"),
    ],
)
def test_reasons_are_one_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_long_texts_lose_their_middle() -> None:
    assert len(reason_of(ValueError("x" * 10_000))) <= 300
    assert shortened("abcdefghij", 7) == "ab...ij" and shortened("abc", 7) == "abc"


def test_errors_travel_between_ranks() -> None:
    for error in (UserError("a"), ConfigError("b"), MissingFileError("c"), UnwritableError("d"), NotAFolderError("e")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def test_what_the_machine_does_is_told_from_bugs() -> None:
    assert "Permission denied" in (machine_error(PermissionError(13, "Permission denied", "/x")) or "")
    assert "loqt-scale plan" in (machine_error(MemoryError()) or "") or machine_error(MemoryError())
    assert "loqt-scale plan" in (machine_error(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")) or "")
    assert machine_error(ValueError("invalid literal")) is None
    assert "do not reach one another" in (machine_error(TimeoutError("rank 1 did not join")) or "")
    assert machine_error(KeyError("x")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_disks_errors_are_the_machines_even_where_no_file_is_named(number: int) -> None:
    """As `write` and `fsync` raise them."""
    told = machine_error(OSError(number, os.strerror(number)))
    assert told is not None and told.startswith(f"{os.strerror(number)}; ") and "None" not in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.ENOENT, errno.EBUSY])
def test_a_file_that_the_system_refuses_comes_with_advice(number: int) -> None:
    told = machine_error(OSError(number, os.strerror(number), "/x"))
    assert told is not None and told.startswith(f"/x: {os.strerror(number)}; ") and len(told.split("; ")[1]) > 10


def test_a_file_that_is_written_is_named_on_every_rank() -> None:
    with pytest.raises(OSError, match="No space") as caught, named(Path("/disk/x")), open("/dev/full", "w") as file:
        file.write("text")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.filename == "/disk/x" and reason_of(copy) == "No space left on device: /disk/x"
    with pytest.raises(FileNotFoundError) as missing, named("/other"):
        Path("/not/there").read_text()
    assert missing.value.filename == "/not/there"


def probe(monkeypatch: pytest.MonkeyPatch, run) -> int:
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(run=run, summary=""))
    return cli.main(["probe"])


@pytest.fixture(autouse=True)
def no_log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(error_log.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("RANK", "LOCAL_RANK", TRACEBACK):
        monkeypatch.delenv(name, raising=False)
    yield
    error_log.keep_errors_in(None)


def fail(argv, prog) -> None:
    raise UserError("line one\nand two")


def test_what_a_person_can_mend_is_one_line_and_leaves_no_trace(capsys, monkeypatch, tmp_path) -> None:
    assert probe(monkeypatch, fail) == 2
    assert capsys.readouterr().err == "loqt-scale probe: error: line one and two\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "name"), [("0", "error.log"), ("3", "error.rank-3.log")])
def test_a_bug_is_one_line_and_its_traceback_is_in_the_run_folder(capsys, monkeypatch, tmp_path, rank, name) -> None:
    """Even one that this package's own code raises as a ValueError, as `int` of a text does."""
    monkeypatch.setenv("RANK", rank)
    folder = tmp_path / "run"
    folder.mkdir()

    def bug(argv, prog) -> None:
        error_log.keep_errors_in(folder)
        shortened("x", "y")  # type: ignore[arg-type]

    for times in (1, 2):  # of a restart: added
        assert probe(monkeypatch, bug) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"[rank {rank}]: error: TypeError: " in line and str(folder / name) in line
        text = (folder / name).read_text()
        assert text.count("Traceback (most recent call last)") == times and "in shortened" in text


def test_before_there_is_a_run_folder_or_where_it_is_gone_the_log_is_elsewhere(capsys, monkeypatch, tmp_path) -> None:
    def bug(argv, prog) -> None:
        error_log.keep_errors_in(tmp_path / "gone")
        raise KeyError("x")

    assert probe(monkeypatch, bug) == 1
    (log,) = tmp_path.iterdir()
    assert str(log) in capsys.readouterr().err and "KeyError: 'x'" in log.read_text()
    monkeypatch.setattr(error_log.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    assert probe(monkeypatch, bug) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "nowhere to keep it" in shown


def test_the_machines_doing_is_status_2_with_a_traceback_kept(capsys, monkeypatch, tmp_path) -> None:
    def full(argv, prog) -> None:
        raise OSError(28, "No space left on device", "/disk/x")

    assert probe(monkeypatch, full) == 2
    line = capsys.readouterr().err
    assert line.startswith("loqt-scale probe: error: /disk/x: No space left on device; make room on its disk")
    assert "(the traceback is in " in line


def test_the_variable_shows_every_traceback(monkeypatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(UserError):
        probe(monkeypatch, fail)
    monkeypatch.setenv(TRACEBACK, "0")
    assert probe(monkeypatch, fail) == 2


def test_ctrl_c_is_one_line(capsys, monkeypatch) -> None:
    def interrupted(argv, prog) -> None:
        raise KeyboardInterrupt

    assert probe(monkeypatch, interrupted) == 130
    assert capsys.readouterr().err == "loqt-scale probe: error: interrupted\n"
