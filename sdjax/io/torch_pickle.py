"""Strict interpreter of the pickles in PyTorch's weight files, which runs nothing.

A pickle is a program for a stack machine that can call any function by its name. The pickle of a
dict of tensors calls only a few, which are known here by name and replaced by plain data: nothing
is imported, and every other name is an error. Tensors become descriptions of where their elements
are; `sdjax.io.torch_file` finds these in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.core.errors import truncated_repr

MAX_PICKLE_BYTES = 16_000_000  # about 100 bytes per tensor
MAX_STEPS = 4_000_000  # about 30 per tensor
_MAX_AXES = 32
_MAX_SIZE = 2**48

# Classes of storages and names of dtypes in torch.
_TYPED_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": np.bool_,
}


class PickleError(ValueError):
    """Error for a pickle that contains anything but dicts of tensors."""


class Storage(NamedTuple):
    """A block of elements in the file.

    Attributes:
        key: its name.
        dtype: the dtype of its elements; uint8 if it has none.
        size: number of elements.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a pickle.

    Attributes:
        storage: the storage of its elements, which other tensors may share.
        dtype: dtype of the elements.
        offset: its first element, counted in elements of its dtype from the start of the storage.
        shape: sizes of the axes.
        strides: steps of the axes, in elements.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    """A function or class that is known by its name."""

    name: str
    dtype: np.dtype | None = None


_FUNCTIONS = (
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
)
_GLOBALS = {
    **{name: _Global(name) for name in _FUNCTIONS},
    **{f"torch.{name}": _Global(name, np.dtype(d)) for name, d in _TYPED_STORAGES.items()},
    "torch.storage.UntypedStorage": _Global("UntypedStorage", np.dtype(np.uint8)),
    **{f"torch.{name}": _Global(name, np.dtype(d)) for name, d in _DTYPES.items()},
}
_MARK = object()


def load_pickle(content: bytes, start: int = 0) -> tuple[Any, int]:
    """Interpret one pickle.

    Args:
        content: bytes that contain it.
        start: its first byte.

    Returns:
        Its value, made of dicts, lists, tuples, numbers, texts, `Storage` and `StoredTensor`, and
        the position after it.

    Raises:
        PickleError: it is damaged, too long, or uses anything else.
    """
    machine = _Machine(content, start)
    try:
        return machine.run(), machine.position
    except PickleError:
        raise
    except (LookupError, struct.error, TypeError, ValueError, RecursionError, MemoryError):
        raise PickleError("a damaged pickle") from None


def tensors_of(value: Any) -> dict[str, StoredTensor]:
    """Return the tensors of a pickle's value by name.

    Raises:
        PickleError: it is not a dict from names to tensors.
    """
    if not isinstance(value, dict):
        raise PickleError(f"{_noun(value)} instead of a dict of tensors")
    for key, item in value.items():
        if not isinstance(key, str):
            raise PickleError(f"the key {truncated_repr(key)}, which is not a name of a tensor")
        if not isinstance(item, StoredTensor):
            raise PickleError(f"{truncated_repr(key)}, which is {_noun(item)} and not a tensor")
    return value


class _Machine:
    """The state of an interpreter: the position in the pickle, the stack and the memo."""

    def __init__(self, content: bytes, start: int):
        self.position = start
        self._content = content
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self._take(1)
            if code == b".":
                return self._stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise PickleError(f"the operation {truncated_repr(code)}")
            operation(self)
        raise PickleError(f"more than {MAX_STEPS:,} operations")

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._content):
            raise PickleError("a truncated pickle")
        taken, self.position = self._content[self.position : end], end
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._content.find(b"\n", self.position, self.position + 300)
        if end < 0:
            raise PickleError("a damaged pickle")
        line = self._content[self.position : end].decode()
        self.position = end + 1
        return line

    def _text(self, form: str) -> None:
        self._stack.append(self._take(self._number(form)).decode())

    def _push(self, form: str) -> None:
        self._stack.append(self._number(form))

    def _big_integer(self) -> None:
        size = self._number("<B")
        if size > 16:
            raise PickleError(f"an integer of {size} bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _items(self) -> list[Any]:
        """Remove and return what is above the topmost mark."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _tuple(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(items[::-1]))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise PickleError("a damaged pickle")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleError(f"a dict with {_noun(key)} as a key")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise PickleError("a damaged pickle")
        self._stack[-1].extend(items)

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError(f"{_noun(module)} and {_noun(name)} as the name of a function")
        found = _GLOBALS.get(f"{module}.{name}")
        if found is None:
            full = truncated_repr(f"{module}.{name}", 100)
            raise PickleError(f"{full}, which is not part of a tensor")
        self._stack.append(found)

    def _find_on_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._find(module, name)

    def _storage(self) -> None:
        """Replace the description of a storage, as torch writes it, by a `Storage`."""
        match self._stack.pop():
            case ("storage", _Global(_, np.dtype() as dtype), str(key), str(), int(count)):
                pass
            # Before version 1.6 also a part of another storage, which was never written by default.
            case ("storage", _Global(_, np.dtype() as dtype), str(key), str(), int(count), None):
                pass
            case _:
                raise PickleError("a reference to something that is not a storage")
        _check_size(count)
        self._stack.append(Storage(key, dtype, count))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise PickleError(f"a call of {_noun(function)}")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                value: Any = {}
            case "torch.Size", (tuple() as value,):
                pass
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, *_):
                value = _tensor(storage, None, offset, shape, strides)
            case (
                "torch._utils._rebuild_tensor_v3",
                (storage, offset, shape, strides, _, _, _Global(_, np.dtype() as dtype), *_),
            ):
                value = _tensor(storage, dtype, offset, shape, strides)
            case "torch._utils._rebuild_parameter", (StoredTensor() as value, *_):
                pass
            case _:
                raise PickleError(f"a call of {function.name} with other arguments than a tensor's")
        self._stack.append(value)

    def _set_state(self) -> None:
        """Ignore the attributes of a dict, the metadata of a `state_dict`."""
        state = self._stack.pop()
        if not (isinstance(self._stack[-1], dict) and isinstance(state, dict)):
            raise PickleError(f"{_noun(self._stack[-1])} with attributes")

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, form: str) -> None:
        self._stack.append(self._memo[self._number(form)])

    def _ignore(self, form: str) -> None:
        self._number(form)


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._ignore("<B"),  # version of the protocol
    b"\x95": lambda m: m._ignore("<Q"),  # length of a frame
    b"(": lambda m: m._stack.append(_MARK),
    b"N": lambda m: m._stack.append(None),
    b"\x88": lambda m: m._stack.append(True),
    b"\x89": lambda m: m._stack.append(False),
    b"K": lambda m: m._push("<B"),
    b"M": lambda m: m._push("<H"),
    b"J": lambda m: m._push("<i"),
    b"G": lambda m: m._push(">d"),
    b"\x8a": lambda m: m._big_integer(),
    b"X": lambda m: m._text("<I"),
    b"\x8c": lambda m: m._text("<B"),
    b"U": lambda m: m._text("<B"),  # bytes, as Python 2 wrote names
    b"T": lambda m: m._text("<I"),
    b"}": lambda m: m._stack.append({}),
    b"]": lambda m: m._stack.append([]),
    b")": lambda m: m._stack.append(()),
    b"t": lambda m: m._stack.append(tuple(m._items())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"s": lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),
    b"u": lambda m: m._set_items(m._items()),
    b"a": lambda m: m._append([m._stack.pop()]),
    b"e": lambda m: m._append(m._items()),
    b"c": lambda m: m._find(m._line(), m._line()),
    b"\x93": lambda m: m._find_on_stack(),
    b"Q": lambda m: m._storage(),
    b"R": lambda m: m._call(),
    b"b": lambda m: m._set_state(),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"h": lambda m: m._get("<B"),
    b"j": lambda m: m._get("<I"),
}


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """Return a tensor, whose elements are within its storage and not more than it has."""
    if not (isinstance(storage, Storage) and isinstance(shape, tuple)):
        raise PickleError("a tensor without a storage or a shape")
    if not isinstance(strides, tuple) or len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise PickleError("a tensor of an unlikely shape")
    dtype = storage.dtype if dtype is None else dtype
    for size in (offset, *shape, *strides):
        _check_size(size)
    count, last = math.prod(shape), offset
    for size, stride in zip(shape, strides, strict=True):
        last += max(size - 1, 0) * stride
    _check_size(math.prod(size for size in shape if size))  # also if a tensor has no elements
    stored = storage.size * storage.dtype.itemsize // dtype.itemsize
    if count and last >= stored:
        raise PickleError(f"a tensor of shape {truncated_repr(shape)} beyond its storage")
    if count > stored:  # expanded: a few stored bytes would fill the memory
        raise PickleError(f"a tensor of shape {truncated_repr(shape)} that repeats its elements")
    return StoredTensor(storage=storage, dtype=dtype, offset=offset, shape=shape, strides=strides)


def _check_size(size: Any) -> None:
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise PickleError(f"the size {_noun(size)}")


def _noun(value: Any) -> str:
    """Return what a value is, for an error message; containers by their kind alone."""
    match value:
        case _Global():
            return f"the name {value.name}"
        case StoredTensor():
            return "a tensor"
        case Storage():
            return "a storage"
        case None | bool() | int() | float() | str():
            return truncated_repr(value)
        case dict():
            return "a dict"
        case list():
            return "a list"
        case tuple():
            return "a tuple"
    return "a mark"
