import gzip
import os

import pytest

from sdjax.core.errors import UserError
from sdjax.io import jsonl
from sdjax.io.jsonl import read_jsonl


def test_lines_are_numbered_from_one_without_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "\\ud83d\\ude00"}\n\n{"a": 2, "b": 3}\n', encoding="utf-8")
    assert read_jsonl(path, ("a",)) == [(1, {"a": "\U0001f600"}), (3, {"a": 2, "b": 3})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"a": 1, "a": 2}', r"line 2: not JSON \(duplicate key 'a'\)"),
        ('{"a": NaN}', r"line 2: not JSON \(NaN is not a number\)"),
        ('{"b\\n": 1}', "line 2: needs the fields a; found: b$"),
        ("[1, 2]", "line 2: needs the fields a; found: not an object"),
        ('{"b": 1}', "line 2: needs the fields a; found: b"),
        ('{"a": "\\ud800"}', r"line 2: not JSON \(contains half of a surrogate pair"),
    ],
)
def test_invalid_line_raises_user_error_with_line_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_jsonl(path, ("a",))


def test_compressed_files_are_read_within_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert read_jsonl(path, ("a",)) == [(1, {"a": 1}), (2, {"a": 2})]
    monkeypatch.setattr(jsonl, "MAX_DECOMPRESSED_BYTES", 10)
    with pytest.raises(UserError, match="more than 10 bytes when decompressed; decompress it"):
        read_jsonl(path, ("a",))


def test_the_ratio_of_compression_is_limited(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 5_000_000 + b'{"a": 1}'))
    assert read_jsonl(path, ("a",)) == [(5_000_001, {"a": 1})]
    monkeypatch.setattr(jsonl, "_SMALL_BYTES", 10)
    with pytest.raises(
        UserError, match=r"rows.jsonl.gz: more than \d+,\d+ bytes when decompressed"
    ):
        read_jsonl(path, ("a",))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1_000])
def test_lines_and_blank_lines_span_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", block)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n \t\r\n{"a": 1}\r\n\n\n  {"a": 2}  \n{"a": 3}\n\n \n{"a": 4}')
    assert read_jsonl(path, ("a",)) == [(3, {"a": 1}), (6, {"a": 2}), (7, {"a": 3}), (10, {"a": 4})]
    path.write_bytes(b" \n\n ")
    assert read_jsonl(path, ("a",)) == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_are_read_within_a_limit(tmp_path, monkeypatch, name):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1_000)
    content = b'{"a": 1}\n' + b" " * 100_000
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match="line 2: longer than 1,000 bytes"):
        read_jsonl(path, ("a",))


@pytest.mark.parametrize(
    "content", [b"plain", gzip.compress(b"{}\n" * 99, mtime=0)[:-12], b"\x1f\x8b"]
)
def test_damaged_compressed_files_are_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows.jsonl.gz: cannot be read \(") as error:
        read_jsonl(path, ())
    assert "\n" not in str(error.value)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="not a file, but a folder, pipe or device"):
            read_jsonl(path, ())
