"""Files as editors, archives and other tools leave them: read, left out as by `load_dataset`, or named with their line."""

import functools
import gzip
import random

import pytest

from jaxrlhf.data import DataError, Prompt, read_records

zipped = functools.partial(gzip.compress, mtime=0)
"""The same bytes whenever tests are collected."""

LINES = ['{"prompt": "é"}', '{"prompt": "b"}']
TEXT = "\n".join(LINES) + "\n"
BOM = "\ufeff"


@pytest.mark.parametrize(
    "name, content",
    [
        ("plain.jsonl", TEXT.encode()),
        ("no end.jsonl", TEXT.strip().encode()),
        ("upper.JSONL", TEXT.encode()),
        ("windows.jsonl", TEXT.replace("\n", "\r\n").encode()),
        ("old mac.jsonl", TEXT.replace("\n", "\r").encode()),
        ("marked.jsonl", (BOM + TEXT).encode()),
        ("joined.jsonl", "".join(BOM + line + "\n" for line in LINES).encode()),
        ("a mark alone.jsonl", (TEXT + BOM + "\n").encode()),
        ("power shell.jsonl", TEXT.replace("\n", "\r\n").encode("utf-16")),
        ("big.jsonl", (BOM + TEXT).encode("utf-16-be")),
        ("no mark.jsonl", TEXT.encode("utf-16-le")),
        ("wide.jsonl", TEXT.encode("utf-32")),
        ("blank.jsonl", ("\n \t\n" + TEXT + "\n\x0c\n").encode()),
        ("zipped.jsonl.gz", zipped(TEXT.encode())),
        ("zipped without a name.jsonl", zipped(TEXT.encode())),
        ("unzipped by a browser.jsonl.gz", TEXT.encode()),
        ("zipped and marked.jsonl.gz", zipped((BOM + TEXT).encode())),
        (
            "in two parts.jsonl.gz",
            zipped(f"{LINES[0]}\n".encode()) + zipped(LINES[1].encode()),
        ),
        ("padded.jsonl.gz", zipped(TEXT.encode()) + bytes(20)),
    ],
)
def test_a_file_is_read_whatever_stored_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        found = read_records(path)
        assert found.records == [Prompt("é"), Prompt("b")] and not found.bad


@pytest.mark.parametrize(
    "content, number, reason",
    [
        (f"{LINES[0]}\n".encode() + '{"prompt": "é"}'.encode("latin-1"), 2, r"not UTF-8 \(byte 0xe9 at column 13\)"),
        (b'\r\n\r\n{"prompt": "\x93a\x94"}\r\n', 3, r"not UTF-8 \(byte 0x93 at column 13\)"),
        (TEXT.encode() + b'{"prompt": "\xed\xa0\x80"}', 3, "not UTF-8"),
        (b'{"prompt": "a\xff', 1, "not UTF-8"),
        (TEXT.encode() + b'{"prompt": "a', 3, r"not JSON \(Unterminated string starting at column 12\)"),
        (TEXT.encode() + bytes(100), 3, "not JSON"),
        (b'{"prompt": "a"},\n', 1, r"not JSON \(Extra data"),
        (b'[{"prompt": "a"}]', 1, "expected a JSON object, got list. Write one object a line."),
        (b'[\n  {"prompt": "a"}\n]', 1, "not JSON on one line; write each record on a line of its own"),
        (b'{\n  "prompt": "a"\n}', 1, "not JSON on one line"),
        (b'{"prompt": "a", "prompt": "b"}', 1, "the key prompt stands twice in one object"),
        (b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}', 1, "the key role stands twice"),
        (b'{"prompt": "a\\udc80"}', 1, "a text holds half of a surrogate pair"),
        (b'{"prompt": "a", "x\\ud800": 1}', 1, "a text holds half of a surrogate pair"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 1, "a number has 5,000 digits"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e400}', 1, "margin must be finite, got inf"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + b"9" * 400 + b"}",
            1,
            "margin must lie between",
        ),
        (b"null", 1, "expected a JSON object, got null"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, content, number, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.jsonl, line {number}: {reason}.* with --skip-bad\.$"):
        read_records(tmp_path / "a.jsonl")
    skipped = read_records(tmp_path / "a.jsonl", skip_bad=True).bad
    assert skipped[0].line == number


@pytest.mark.parametrize(
    "content, reason",
    [
        (zipped(TEXT.encode() * 2000)[:-50], "not readable as text .*ended"),
        (zipped(TEXT.encode())[:5], "not readable as text"),
        (
            zipped(random.Random(0).randbytes(99).hex().encode() * 99)[:30] + bytes(50),
            "not readable as text",
        ),
        (TEXT.encode("utf-16")[:-1], "not readable as text"),
        (b"PK\x03\x04rest", "is a zip archive; unpack it"),
        (b"PAR1rest", "is a Parquet file; let its name end in .parquet"),
        (b"\x28\xb5\x2f\xfdrest", "is compressed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS.*git lfs pull"),
        (b"", "holds no line of data"),
        (b"\n\n", "holds no line of data"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jsonl.* {reason}"):
        read_records(tmp_path / "a.jsonl", skip_bad=True)


@pytest.mark.parametrize(
    "left_over",
    [
        ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".a.jsonl", "__MACOSX/._a.jsonl", "__MACOSX/a.jsonl",
        ".git/a.jsonl", "sub/.cache/deep/a.jsonl", "__pycache__/a.jsonl", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp",
        "a.jsonl.bak", "a.jsonl.part", "README.md", ".DS_Store", "sub/.DS_Store", "notes.txt", ".~lock.a.jsonl#",
    ],
)  # fmt: skip
def test_what_tools_leave_in_a_folder_is_left_out(tmp_path, left_over):
    folder = tmp_path / ".hidden" / "__data__"  # what leads to the folder was asked for
    (folder / left_over).parent.mkdir(parents=True)
    (folder / left_over).write_bytes(b"\x00\x05\x16\x07 no JSON")
    (folder / "a.jsonl").write_text(TEXT)
    assert len(read_records(folder).records) == 2
    (folder / "a.jsonl").unlink()
    if left_over != "notes.txt":
        with pytest.raises(DataError, match=r"holds no \.jsonl, \.parquet, \.csv or \.txt file"):
            read_records(folder)


def test_files_that_would_be_read_twice_or_not_at_all_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(TEXT)
    (tmp_path / "a.jsonl.gz").write_bytes(zipped(TEXT.encode()))
    with pytest.raises(DataError, match="is there both plain and gzipped, and would be read twice"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl.gz").unlink()
    (tmp_path / "latest.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"latest\.jsonl is a link to .*a\.jsonl, which would be read twice"):
        read_records(tmp_path)
    (tmp_path / "latest.jsonl").unlink()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl leads to no file"):
        read_records(tmp_path)
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "part").symlink_to(tmp_path)
    with pytest.raises(DataError, match="part is a link to a folder, which is not followed"):
        read_records(tmp_path)


def test_plain_text_keeps_what_is_not_a_line_end(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\u0085c\r\n\ufeffd \n\n".encode())
    assert [record.completion for record in read_records(tmp_path).records] == ["a\u2028b\u0085c", "d "]
