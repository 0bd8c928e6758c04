"""Damaged and hostile headers of safetensors files, and indexes of several files."""

import json
import os
import resource

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.io import safetensors_writer
from sdjax.io.safetensors_reader import SafetensorsReader
from sdjax.io.safetensors_writer import read_header, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def content(header, *, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


FILES = {
    "empty": b"",
    "no header": b"\0" * 8,
    "length beyond the file": content({"a": ENTRY}, length=1_000),
    "length of terabytes": content({"a": ENTRY}, length=2**63),
    "not JSON": content(b"{"),
    "a list": content([ENTRY]),
    "nested": content(b"[" * 100_000),
    "not UTF-8": content(b'{"\xff": 1}'),
    "duplicate tensor": content(b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "entry is a number": content({"a": 1}),
    "no dtype": content({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "dtype is a number": content({"a": {**ENTRY, "dtype": 1}}),
    "unknown dtype": content({"a": {**ENTRY, "dtype": "F33"}}),
    "shape is a number": content({"a": {**ENTRY, "shape": 2}}),
    "shape of text": content({"a": {**ENTRY, "shape": ["2"]}}),
    "shape of booleans": content({"a": {**ENTRY, "shape": [True, 2]}}),
    "negative shape": content({"a": {**ENTRY, "shape": [-2]}}),
    "shape overflow": content({"a": {**ENTRY, "shape": [2**62, 2**62]}}),
    "shape of a number of 5,000 digits": content(
        b'{"a": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 8]}}' % (b"9" * 5_000)
    ),
    "larger shape than data": content({"a": {**ENTRY, "shape": [3]}}),
    "offsets beyond the file": content({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}),
    "offsets reversed": content({"a": {**ENTRY, "data_offsets": [8, 0]}}),
    "one offset": content({"a": {**ENTRY, "data_offsets": [8]}}),
    "blanks": content(b" " * 100 + b"{}"),
    "padding of 100 bytes": content(b"{}" + b" " * 100),
    "overlap": content({"a": ENTRY, "b": ENTRY}),
    "data between tensors": content({"a": {**ENTRY, "data_offsets": [8, 16]}}, data=b"\0" * 16),
    "more data": content({"a": ENTRY}, data=b"\0" * 9),
}


def read_infos(folder):
    reader = SafetensorsReader(folder)
    return reader.infos(reader.names)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(FILES[name])
    with pytest.raises(UserError) as error:
        read_infos(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / "model.safetensors"))
    assert "truncated or not a safetensors file (" in message or "F33" in message
    assert message.isprintable()
    assert len(message) < 600


def test_long_names_are_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a" * 2_000: np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="a name of 2,000 characters"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("limit", "message"),
    [("MAX_TENSORS", "a header of more than 2 tensors"), ("MAX_HEADER_BYTES", "a header of 3")],
)
def test_large_headers_are_refused_before_they_are_parsed(tmp_path, monkeypatch, limit, message):
    tensors = {name: np.zeros(1, np.float32) for name in "abcde"}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert len(read_infos(tmp_path)) == 5
    monkeypatch.setattr(safetensors_writer, limit, 2)
    for read in (SafetensorsReader, lambda folder: read_header(folder / "model.safetensors")):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_files_larger_than_the_address_space_are_refused_in_one_line(tmp_path):
    """A sparse file of 1 TiB, whose tensor is as large."""
    size = 2**40
    header = content(
        {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, data=b""
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) + size)
    before = resource.getrlimit(resource.RLIMIT_AS)
    reader = SafetensorsReader(tmp_path)
    resource.setrlimit(resource.RLIMIT_AS, (2**39, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"the tensor 'a' of shape \(\d+,\) does not fit in memory"
        ):
            reader.read("a")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not an index of weights"),
        (b"{}", "not an index of weights"),
        (b'{"weight_map": 5}', "not an index of weights"),
        (b'{"weight_map": [["a", "b"]]}', "not an index of weights"),
        (b'{"weight_map": {"a": 5}}', "not an index of weights"),
        (b'{"weight_map": {"a": null}}', "not an index of weights"),
        (b'{"weight_map": {"a": "b"}, "weight_map": {}}', "duplicate key 'weight_map'"),
        (b'{"weight_map": {"a": ""}}', "is not the name of a file"),
        (b'{"weight_map": {"a": "."}}', "is not the name of a file"),
        (b'{"weight_map": {"a": "b/"}}', "listed in model.safetensors.index.json but missing"),
    ],
)
def test_damaged_indexes_are_refused_in_one_line(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match=message) as error:
        SafetensorsReader(tmp_path)
    assert str(error.value).isprintable()
