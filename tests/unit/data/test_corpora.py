"""Local text: the embedded corpus and the three kinds of files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from loqt_scale.data import corpora, text_files
from loqt_scale.data.corpora import EMBEDDED_MAX_BYTES, embedded_text, files_text, joined_text

ROWS = ["first\n\nstill first", "second", "third"]


def read(*patterns: str | Path, field: str = "text") -> list[str]:
    return list(files_text([str(pattern) for pattern in patterns], field).documents())


def write_jsonl(path: Path, texts: list[str | None], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str], field: str = "text") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({field: texts, "n": list(range(len(texts)))}), path)
    return path


def test_embedded_corpus_is_a_few_megabytes_of_documents_in_a_fixed_order() -> None:
    text = embedded_text()
    documents = list(text.documents())
    size = sum(len(document.encode("utf-8", "surrogatepass")) for document in documents)
    assert len(documents) > 300
    assert 3_000_000 < size < EMBEDDED_MAX_BYTES + 1_000_000
    assert documents == list(text.documents())
    assert text.key == embedded_text().key
    assert documents[0].startswith(('The "assert"', "The"))  # prose first
    assert all(document.strip() for document in documents)


def test_embedded_corpus_leaves_out_tests_and_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "# " + "words " * 60
    for name in ("b.py", "a/x.py", "test/t.py", "site-packages/s.py", "_sysconfigdata_x.py", "config-3/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{long}\n# {name}")
    (tmp_path / "short.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    sources = [d for d in embedded_text().documents() if d.startswith(long)]
    assert [d.rsplit(" ", 1)[1] for d in sources] == ["b.py", "a/x.py"]


def test_embedded_corpus_without_any_text_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(corpora, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ValueError, match=r"no embedded corpus; write data\.files"):
        embedded_text()


def test_text_files_are_parted_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \t\r\n\r\nthree\n   \nfour")
    assert read(path) == ["one\ntwo\n", "three\n", "four"]


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 .*data\.files"):
        read(path)


def test_a_text_file_without_blank_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be one document of any size; one of many short ones a line is meant for .jsonl."""
    monkeypatch.setattr("loqt_scale.data.text_files._LONGEST_BLOCK", 40)
    path = tmp_path / "a.txt"
    path.write_text("a line\n" * 5 + "\n" + "a line\n" * 5)
    assert len(read(path)) == 2
    path.write_text("a line\n" * 6)
    with pytest.raises(ValueError, match=r"a\.txt has 42 characters without a blank line.*one JSON object a line"):
        read(path)


@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines_and_parquet_give_their_text_column(tmp_path: Path, field: str) -> None:
    expected = [ROWS[0], ROWS[1], ROWS[2]]
    for path in (
        write_jsonl(tmp_path / "a.jsonl", [ROWS[0], None, "  ", *ROWS[1:]], field),
        write_jsonl(tmp_path / "b.json", list(ROWS), field),
        write_parquet(tmp_path / "c.parquet", ROWS, field),
    ):
        assert read(path, field=field) == expected


def zstd(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".gz", lambda path, content: path.write_bytes(gzip.compress(content))),
        (".bz2", lambda path, content: path.write_bytes(bz2.compress(content))),
        (".xz", lambda path, content: path.write_bytes(lzma.compress(content))),
        (".zst", zstd),
    ],
)
def test_compressed_files_and_folders_are_read(
    tmp_path: Path, suffix: str, write: Callable[[Path, bytes], object]
) -> None:
    text, rows = "caf\u00e9\n\nanother\n", "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    (tmp_path / "sub").mkdir()
    write(tmp_path / f"a.txt{suffix}", text.encode())
    write(tmp_path / "sub" / f"b.jsonl{suffix}", rows.encode())
    (tmp_path / "sub" / "notes.md").write_text("no document")
    (tmp_path / ".hidden.txt").write_text("no document")
    assert read(tmp_path) == ["caf\u00e9\n", "another\n", *ROWS]
    cut_off = tmp_path / f"cut.txt{suffix}"
    cut_off.write_bytes((tmp_path / f"a.txt{suffix}").read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"cut\.txt\{suffix} cannot be read to its end: .*; mend it, or leave it"):
        read(cut_off)


def test_a_window_that_is_too_large_to_read_says_how_to_compress_anew(tmp_path: Path) -> None:
    header = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, (31 - 10) << 3])  # zstd --long=31, of a length that is not told
    (tmp_path / "long.txt.zst").write_bytes(header + bytes(20))
    with pytest.raises(ValueError, match=r"long\.txt\.zst cannot be read to its end.*compress it again without --long"):
        read(tmp_path / "long.txt.zst")


def test_a_text_without_a_border_is_refused_before_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_LONGEST_BLOCK", 1000)
    path = tmp_path / "one.txt"
    path.write_text("a " * 499 + "\n\n" + "b\n" * 499)  # two documents that are just short enough
    assert [len(document) for document in read(path)] == [999, 998]
    path.write_text("line\n\n" + "a " * 50_000)
    longest = 0

    class Watched(io.TextIOWrapper):
        def readline(self, size: int = -1) -> str:  # type: ignore[override]
            nonlocal longest
            line = super().readline(size)
            longest = max(longest, len(line))
            return line

    monkeypatch.setattr(text_files.io, "TextIOWrapper", Watched)
    with pytest.raises(ValueError, match=r"one\.txt has 1,001 characters without a blank line"):
        read(path)
    assert longest == 1001


def test_columns_that_nobody_needs_end_nothing(tmp_path: Path) -> None:
    """They change their type, or appear, after what a reader of types looks at (10 MB); rows without text are none."""
    rows: list[dict[str, object]] = [{"text": "x" * 200, "n": i} for i in range(60_000)]
    rows += [{"text": "late", "n": "three", "url": {"a": [1, "b"]}}, {"n": None}, {"text": None}, {"text": "last"}]
    path = tmp_path / "late.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"late\.jsonl: 1 of 60,004 rows have no column 'text' .*are left out"):
        assert read(path)[-2:] == ["late", "last"]
    path.write_text(json.dumps(rows[-4:], indent=1))
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        assert read(path) == ["late", "last"]
    path.write_text('{"text": "a"}\n"text"\n')
    with pytest.raises(ValueError, match=r"line 2 holds str, not an object; write one JSON object a line"):
        read(path)


def test_globs_are_sorted_recursive_and_read_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "**" / "*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "b.txt", tmp_path / "*.txt") == ["b.txt", "a.txt"]


def test_names_with_glob_characters_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    assert read(write_jsonl(folder / "x?.jsonl", ["hello"])) == ["hello"]


def test_several_texts_come_by_turns_so_that_a_beginning_holds_all_of_them(tmp_path: Path) -> None:
    """A BPE is trained on the first characters: of each source as many."""
    for name, document, count in (("long", "l" * 10, 50), ("short", "s" * 3, 2), ("wide", "w" * 30, 40)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([document] * count))
    texts = [files_text([str(tmp_path / f"{name}.txt")], "text") for name in ("long", "short", "wide")]
    joined = joined_text(texts)
    documents = list(joined.documents())
    assert sorted(documents) == sorted(document for text in texts for document in text.documents())
    sizes = [sum(len(document) for document in documents[:30] if document[0] == letter) for letter in "lsw"]
    assert abs(sizes[0] - sizes[2]) <= 31 and 6 <= sizes[1] <= 8
    assert joined.size == sum(text.size for text in texts) and joined_text(texts[:1]) is texts[0]
    assert joined.key != joined_text(texts[::-1]).key


def test_key_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    first = files_text([str(path)], "text").key
    assert files_text([str(path)], "text").key == first
    path.write_text("two")
    assert files_text([str(path)], "text").key != first


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.txt does not exist.*data\.files"):
        files_text([str(tmp_path / "nope.txt")], "text")


def test_glob_without_matches_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.jsonl.*data\.files"):
        files_text([str(tmp_path / "*.jsonl")], "text")


def test_unknown_extension_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv is not a kind of file .*\.parquet.*data\.files"):
        files_text([str(path)], "text")


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"data\.files names the folder .*, which holds no \.txt, .*another one"):
        files_text([str(tmp_path)], "text")
    with pytest.raises(ValueError, match=r"data\.files is empty"):
        files_text([], "text")


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    for path in (
        write_jsonl(tmp_path / "a.jsonl", ["x"], "content"),
        write_parquet(tmp_path / "a.parquet", ["x"], "content"),
    ):
        with pytest.raises(ValueError, match=r"no column 'text'; write data\.text_field: one of content, n"):
            read(path)


def test_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(
        ValueError, match=r"column 'n' of .* holds int \(0\), not text; write data\.text_field: one of text"
    ):
        read(path, field="n")
    path.write_text('{"text": "a", "n": 1}\n{"text": [5], "n": 1}\n')
    with pytest.raises(ValueError, match=r"column 'text' of .* holds list \(\[5\]\), not text; mend that row"):
        read(path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text":\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read as json: .*data\.files"):
        read(path)


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).touch()
    write_parquet(tmp_path / "a.parquet.parquet", [])
    assert read(tmp_path / "a.*") == []
