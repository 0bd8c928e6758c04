"""Memory traffic of an executable: bytes read and written by each operation, per memory.

XLA's own count ("bytes accessed") adds reads of the chip's main memory to reads of the on-chip
memory, into which the compiler first copies most arrays. It also counts an in-place update as a
read and a write of the entire array. This module counts them separately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Bytes per element of XLA's types. Other types (tokens, keys) count as zero.
_ITEM_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"index=(\d+)")
_WHILE = re.compile(r" while\(%([\w.\-]+)\), condition=%[\w.\-]+, body=%([\w.\-]+)")
_ON_CHIP = "S(1)"  # the memory space in a layout
# Operations that move no bytes, because the result aliases the operand.
_ALIASES = {
    *("bitcast", "get-tuple-element", "tuple", "copy-done", "slice-done", "optimization-barrier")
}
_ASYNC_STARTS = {"copy-start", "slice-start"}
_WITHOUT_TRAFFIC = {"constant", "parameter", "iota", "partition-id", "replica-id", "while"}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Bytes that an operation reads or writes.

    Attributes:
        written: Whether the bytes are written rather than read.
        on_chip: Whether the bytes are in on-chip memory rather than the chip's main memory.
        source: The executable's argument that is read, or None.
        size: Number of bytes.
    """

    written: bool
    on_chip: bool
    source: str | None
    size: int


def entry_transfers(hlo: str) -> list[Transfer]:
    """Return the transfers per call outside the loop, from an executable's HLO text."""
    return _Computation(_computation_lines(hlo, "ENTRY ")).transfers


def loop_transfers(hlo: str) -> list[Transfer]:
    """Return the transfers per iteration of the executable's loop."""
    match = _WHILE.search(hlo)
    assert match is not None, "the executable has no loop"
    carry, body = match.groups()
    caller = _Computation(_computation_lines(hlo, "ENTRY "))
    arguments = [caller.sources.get(name) for name in caller.operands[carry]]
    return _Computation(_computation_lines(hlo, f"%{body} ("), arguments).transfers


def sum_by_role(
    transfers: Iterable[Transfer], role: Callable[[str | None, int], str]
) -> Mapping[tuple[bool, bool, str], int]:
    """Sum bytes by (on_chip, written, role).

    Args:
        transfers: Transfers of one computation.
        role: Maps the source and size of a transfer to a label.
    """
    sums: dict[tuple[bool, bool, str], int] = {}
    for transfer in transfers:
        key = (transfer.on_chip, transfer.written, role(transfer.source, transfer.size))
        sums[key] = sums.get(key, 0) + transfer.size
    return sums


class _Computation:
    """A parsed HLO computation.

    Attributes:
        transfers: The transfers of its instructions.
        sources: The executable's argument that each instruction passes on, by instruction name.
        operands: The names of each instruction's operands.
    """

    def __init__(self, lines: Sequence[str], carry_sources: Sequence[str | None] = ()) -> None:
        """Parse the instructions.

        Args:
            lines: The instructions, one per line.
            carry_sources: For a loop body, the argument that each element of its carry comes from.
        """
        self.transfers: list[Transfer] = []
        self.sources: dict[str, str | None] = {}
        self.operands: dict[str, list[str]] = {}
        self._arrays: dict[str, list[tuple[int, bool]]] = {}  # (bytes, on chip)
        self._carry_sources, self._parameter = carry_sources, ""
        for line in lines:
            if match := _INSTRUCTION.match(line):
                self._add_instruction(line, *match.groups())

    def _add_instruction(self, line: str, name: str, shape: str, opcode: str, inside: str) -> None:
        operands = self.operands[name] = re.findall(r"%([\w.\-]+)", inside)
        arrays = self._arrays[name] = _parse_arrays(shape)
        op_name = _OP_NAME.search(line)
        if 'custom_call_target="ConcatBitcast"' in line:
            opcode = "bitcast"
        if opcode == "parameter":
            self.sources[name] = op_name[1] if op_name else None
            self._parameter = name
        elif (
            opcode == "get-tuple-element" and self._carry_sources and operands == [self._parameter]
        ):
            index = _INDEX.search(line)
            self.sources[name] = self._carry_sources[int(index[1])] if index else None
        elif opcode in _ALIASES | _ASYNC_STARTS and operands:
            self.sources[name] = self.sources.get(operands[0])
        if opcode in _ASYNC_STARTS:
            # copy-start yields (result, operand, …), slice-start (operand, result, …).
            result, operand = arrays[:2] if opcode == "copy-start" else arrays[1::-1]
            self._add_transfer(False, self.sources[name], result[0], operand[1])
            self._add_transfer(True, None, *result)
        elif opcode in _ALIASES | _WITHOUT_TRAFFIC or opcode.endswith("-done"):
            return
        elif op_name and op_name[1].endswith("/scatter") and arrays == self._arrays[operands[0]]:
            # In-place update: only the updated elements are read and written.
            size = sum(size for size, _ in self._arrays[operands[-1]])
            self._add_transfer(False, None, size, self._arrays[operands[-1]][0][1])
            self._add_transfer(True, None, size, arrays[0][1])
        else:
            for operand_name in operands:
                for array in self._arrays.get(operand_name, ()):
                    self._add_transfer(False, self.sources.get(operand_name), *array)
            for array in arrays:
                self._add_transfer(True, None, *array)

    def _add_transfer(self, written: bool, source: str | None, size: int, on_chip: bool) -> None:
        self.transfers.append(Transfer(written=written, on_chip=on_chip, source=source, size=size))


def _computation_lines(hlo: str, header: str) -> list[str]:
    """Return the lines of the computation whose header starts with `header`."""
    begin = hlo.index(f"\n{header}")
    return hlo[begin : hlo.index("\n}", begin)].splitlines()[2:]


def _parse_arrays(shape: str) -> list[tuple[int, bool]]:
    """Return (bytes, on chip) for every array of an HLO type."""
    return [
        (
            _ITEM_SIZES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size),
            _ON_CHIP in (layout or ""),
        )
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
