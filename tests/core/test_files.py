"""Files of others: sizes, encodings, and what is not a regular file."""

import os
import socket

import pytest

from sdjax.core.errors import UserError
from sdjax.core.files import open_file, read_bytes, read_json_file, read_text


def test_files_are_read_up_to_their_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes("\ufeff{}".encode())
    assert read_text(path, 5) == "{}"
    assert read_json_file(path, 5) == {}
    with pytest.raises(UserError, match="file: larger than 4 bytes, which no file"):
        read_bytes(path, 4)


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a\xff")
    with pytest.raises(UserError, match="file: not UTF-8 at byte 1; save the file as UTF-8"):
        read_text(path)
    with pytest.raises(UserError, match=r"file: not valid JSON \(not UTF-8 at byte 1\)"):
        read_json_file(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
    for path, message in (
        (tmp_path / "pipe", "not a file, but a folder, pipe or device"),
        (tmp_path, "not a file, but a folder, pipe or device"),
        ("/dev/zero", "not a file, but a folder, pipe or device"),
        (tmp_path / "socket", r"cannot be read \(No such device or address\)"),
        (tmp_path / "missing", r"cannot be read \(No such file or directory\)"),
        (tmp_path / "a\0b", r"cannot be read \(.*embedded null"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_file(path)
        assert "\n" not in str(error.value)
