"""Where the bytes of a compiled program go: every operation's operands and results, by role.

XLA's own count ("bytes accessed") takes an update in place for a read and a write of the whole
array, and says nothing of what was read. Here each operation of the program's entry is a line:
which arguments it reads, how large its result is, and whether that takes over a buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

# Bytes an element of XLA's types; others (tokens, keys) count as nothing.
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)")
_ARGUMENT = re.compile(r'op_name="([^"]*)"')
# These move nothing; what comes out is what went in.
_NAMES = {
    "bitcast",
    "get-tuple-element",
    "tuple",
    "copy-done",
    "slice-done",
    "optimization-barrier",
}
_NOTHING = {"constant", "parameter", "iota", "partition-id", "replica-id"}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a program.

    Attributes:
        kind: XLA's name of it.
        reads: argument of the program (or None for what was computed) and bytes, an operand each.
        writes: bytes of the result.
    """

    kind: str
    reads: tuple[tuple[str | None, int], ...]
    writes: int


def operations(text: str) -> list[Operation]:
    """The operations of the entry of a compiled program's text."""
    sizes: dict[str, int] = {}
    sources: dict[str, str | None] = {}
    found = []
    for line in text[text.index("\nENTRY ") :].splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, shape, kind, inside = match.groups()
        operands = re.findall(r"%([\w.\-]+)", inside)
        sizes[name] = _bytes(shape)
        argument = _ARGUMENT.search(line)
        sources[name] = argument.group(1) if kind == "parameter" and argument else None
        if kind in _NAMES and operands:
            sources[name] = sources.get(operands[0])
        if kind in _NAMES | _NOTHING:
            continue
        if kind.endswith("-start") and operands:  # brings an argument nearer; read where it is used
            sources[name] = sources.get(operands[0])
            if sources[name] is not None:
                continue
        reads = tuple((sources.get(one), sizes.get(one, 0)) for one in operands)
        found.append(Operation(kind=kind, reads=reads, writes=sizes[name]))
    return found


def by_role(
    found: list[Operation], role: Callable[[str | None, int], str]
) -> dict[tuple[str, str], int]:
    """Bytes read and written: ("read" or "written", role of argument and size) to their sum."""
    sums: dict[tuple[str, str], int] = {}
    for one in found:
        for source, size in one.reads:
            key = ("read", role(source, size))
            sums[key] = sums.get(key, 0) + size
        key = ("written", role(None, one.writes))
        sums[key] = sums.get(key, 0) + one.writes
    return sums


def _bytes(shape: str) -> int:
    return sum(
        _SIZES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(shape)
    )
