"""Header of a GGUF file: its settings, and where its tensors are.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import open_file
from sdjax.io.gguf_blocks import ELEMENT_TYPES, UNSUPPORTED_TYPES, ElementType
from sdjax.io.safetensors_writer import MAX_NAME_LENGTH, MAX_TENSORS

MAX_HEADER_BYTES = 64_000_000  # most of it the tokenizer's tokens and merges
MAX_SETTINGS = 10_000
MAX_ITEMS = 4_000_000  # of all arrays in a header
_MAX_AXES = 4
_KEPT_ITEMS = 1_000  # longer arrays, those of a tokenizer, are skipped
_NUMBERS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        type: its element type.
        shape: sizes of its axes, the last one contiguous (the reverse of the file's order).
        offset: its first byte in the file.
    """

    type: ElementType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Number of bytes along the last axis."""
        return self.shape[-1] // self.type.elements * self.type.bytes


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return the settings of a GGUF file and its tensors by name, all of them within the file.

    Arrays of more than 1,000 items are left out of the settings.

    Raises:
        UserError: not a GGUF file, a damaged one, or a tensor of an unsupported type.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = _Header(file.read(MAX_HEADER_BYTES))
        return header.settings(), header.tensors(size)
    except (ValueError, struct.error, UnicodeDecodeError, OSError) as error:
        reason = "the header ends too early" if isinstance(error, struct.error) else str(error)
        raise UserError(
            f"{path}: truncated or not a supported GGUF file ({reason}); copy the file again, or "
            "use one of a supported type"
        ) from None


class _Header:
    """The bytes of a header, and the position of the next one to read."""

    def __init__(self, content: bytes):
        self._content = content
        self._position = 0
        self._items = 0
        if content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._position = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian")
        self._num_tensors, self._num_settings = self._number("<Q"), self._number("<Q")
        if self._num_tensors > MAX_TENSORS or self._num_settings > MAX_SETTINGS:
            raise ValueError(f"{self._num_tensors:,} tensors and {self._num_settings:,} settings")

    def settings(self) -> dict[str, Any]:
        """Read the settings, which come first."""
        settings: dict[str, Any] = {}
        for _ in range(self._num_settings):
            key = self._string(MAX_NAME_LENGTH)
            value = self._value(self._number("<I"))
            if key in settings:
                raise ValueError(f"two settings {truncated_repr(key)}")
            if value is not None:
                settings[key] = value
        self._alignment = settings.get("general.alignment", 32)
        if not isinstance(self._alignment, int) or not 0 < self._alignment <= 2**20:
            raise ValueError("general.alignment is not a small integer")
        return settings

    def tensors(self, size: int) -> dict[str, GgufTensor]:
        """Read the tensors of a file of `size` bytes."""
        entries = [self._tensor() for _ in range(self._num_tensors)]
        start = -(-self._position // self._alignment) * self._alignment
        tensors: dict[str, GgufTensor] = {}
        for name, element_type, shape, offset in entries:
            tensor = GgufTensor(type=element_type, shape=shape, offset=start + offset)
            if not all(shape) or shape[-1] % element_type.elements:
                raise ValueError(f"{truncated_repr(name)} has rows of no or of broken blocks")
            if tensor.offset + math.prod(shape[:-1]) * tensor.row_bytes > size:
                raise ValueError(f"{truncated_repr(name)} is not within the file")
            if name in tensors:
                raise ValueError(f"two tensors {truncated_repr(name)}")
            tensors[name] = tensor
        return tensors

    def _tensor(self) -> tuple[str, ElementType, tuple[int, ...], int]:
        name, num_axes = self._string(MAX_NAME_LENGTH), self._number("<I")
        if not 0 < num_axes <= _MAX_AXES:
            raise ValueError(f"{truncated_repr(name)} has {num_axes:,} axes")
        shape = tuple(self._number("<Q") for _ in range(num_axes))[::-1]
        code, offset = self._number("<I"), self._number("<Q")
        if code not in ELEMENT_TYPES:
            kind = UNSUPPORTED_TYPES.get(code, f"type {code}")
            known = ", ".join(known.name for known in ELEMENT_TYPES.values())
            raise ValueError(
                f"{truncated_repr(name)} is {kind}, which is not supported; supported: {known}"
            )
        return name, ELEMENT_TYPES[code], shape, offset

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack_from(form, self._content, self._position)
        self._position += struct.calcsize(form)
        return number

    def _string(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self._number("<Q")
        end = self._position + length
        if length > max_bytes or end > len(self._content):
            raise ValueError(f"a text of {length:,} bytes")
        text, self._position = self._content[self._position : end], end
        return text.decode()

    def _value(self, code: int) -> Any:
        """Return a value; None for an array that is skipped."""
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code == _STRING:
            return self._string()
        if code != _ARRAY:
            raise ValueError(f"a setting of type {code}")
        item, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > MAX_ITEMS or item not in (*_NUMBERS, _STRING):
            raise ValueError(f"an array of {count:,} items of type {item}")
        if count <= _KEPT_ITEMS:
            return [self._value(item) for _ in range(count)]
        if item == _STRING:
            for _ in range(count):
                length = self._number("<Q")
                self._position += length
        else:
            self._position += count * struct.calcsize(_NUMBERS[item])
        return None
