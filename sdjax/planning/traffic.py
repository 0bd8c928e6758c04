"""Where the bytes of a compiled program go: what every operation reads and writes, by memory.

XLA's own count ("bytes accessed") adds up what is read of the chip's memory and what is read once
more of the small memory beside its units, into which the compiler brings most arrays first; an
update in place counts as a read and a write of the whole array. Here each is told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Bytes an element of XLA's types; others (tokens, keys) count as nothing.
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)")
_LABEL = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"index=(\d+)")
_LOOP = re.compile(r" while\(%([\w.\-]+)\), condition=%[\w.\-]+, body=%([\w.\-]+)")
_NEAR = "S(1)"  # in a layout: the memory beside the units
# These move nothing; what comes out is what went in.
_NAMES = {
    *("bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "optimization-barrier")
}
_STARTS = {"copy-start", "slice-start"}
_NOTHING = {"constant", "parameter", "iota", "partition-id", "replica-id", "while"}


@dataclass(frozen=True, kw_only=True)
class Move:
    """Bytes that an operation reads or writes.

    Attributes:
        written: whether it writes them.
        near: whether they are in the memory beside the units, not in the chip's large one.
        source: the argument of the program that is read, or None.
        size: bytes.
    """

    written: bool
    near: bool
    source: str | None
    size: int


def entry(text: str) -> list[Move]:
    """What a program moves once a call, outside its loop, by the compiled program's text."""
    return _Computation(_lines(text, "ENTRY ")).moves


def loop(text: str) -> list[Move]:
    """What the body of a program's loop moves, each time."""
    found = _LOOP.search(text)
    assert found is not None, "the program has no loop"
    carried, body = found.groups()
    called = _Computation(_lines(text, "ENTRY "))
    arguments = [called.sources.get(name) for name in called.operands[carried]]
    return _Computation(_lines(text, f"%{body} ("), arguments).moves


def summed(
    moves: Iterable[Move], role: Callable[[str | None, int], str]
) -> Mapping[tuple[bool, bool, str], int]:
    """(near, written, role of argument and size) to bytes."""
    sums: dict[tuple[bool, bool, str], int] = {}
    for one in moves:
        key = (one.near, one.written, role(one.source, one.size))
        sums[key] = sums.get(key, 0) + one.size
    return sums


class _Computation:
    """One computation of a program's text.

    Attributes:
        moves: of its operations.
        sources: name to the argument that it is.
        operands: name to the names of what it is made of.
    """

    def __init__(self, lines: Sequence[str], carried: Sequence[str | None] = ()):
        """carried: the arguments that the elements of a loop body's parameter are."""
        self.moves: list[Move] = []
        self.sources: dict[str, str | None] = {}
        self.operands: dict[str, list[str]] = {}
        self._arrays: dict[str, list[tuple[int, bool]]] = {}  # bytes, and whether near
        self._carried, self._parameter = carried, ""
        for line in lines:
            if match := _LINE.match(line):
                self._read(line, *match.groups())

    def _read(self, line: str, name: str, shape: str, kind: str, inside: str) -> None:
        operands = self.operands[name] = re.findall(r"%([\w.\-]+)", inside)
        arrays = self._arrays[name] = _arrays(shape)
        label = _LABEL.search(line)
        if 'custom_call_target="ConcatBitcast"' in line:
            kind = "bitcast"
        if kind == "parameter":
            self.sources[name] = label[1] if label else None
            self._parameter = name
        elif kind == "get-tuple-element" and self._carried and operands == [self._parameter]:
            index = _INDEX.search(line)
            self.sources[name] = self._carried[int(index[1])] if index else None
        elif kind in _NAMES | _STARTS and operands:
            self.sources[name] = self.sources.get(operands[0])
        if kind in _STARTS:  # the result, the operand and more as a tuple; or the operand first
            after, before = arrays[:2] if kind == "copy-start" else arrays[1::-1]
            self._move(False, self.sources[name], after[0], before[1])
            self._move(True, None, *after)
        elif kind in _NAMES | _NOTHING or kind.endswith("-done"):
            return
        elif label and label[1].endswith("/scatter") and arrays == self._arrays[operands[0]]:
            size = sum(size for size, _ in self._arrays[operands[-1]])  # in place: the update alone
            self._move(False, None, size, self._arrays[operands[-1]][0][1])
            self._move(True, None, size, arrays[0][1])
        else:
            for one in operands:
                for array in self._arrays.get(one, ()):
                    self._move(False, self.sources.get(one), *array)
            for array in arrays:
                self._move(True, None, *array)

    def _move(self, written: bool, source: str | None, size: int, near: bool) -> None:
        self.moves.append(Move(written=written, near=near, source=source, size=size))


def _lines(text: str, start: str) -> list[str]:
    """The lines of the computation that begins so."""
    begin = text.index(f"\n{start}")
    return text[begin : text.index("\n}", begin)].splitlines()[2:]


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of every array in a type, and whether it is near."""
    return [
        (
            _SIZES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size),
            _NEAR in (layout or ""),
        )
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
