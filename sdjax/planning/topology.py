"""Devices of an accelerator that is not there, and what a program compiled for them needs.

libtpu's compiler runs on any Linux machine: it gives devices of a topology by name, for which
`jax.jit(...).lower(...).compile()` works as ever. The compiled program tells its memory a chip, the
bytes that it accesses and its collectives.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from sdjax.core.errors import UserError

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# The result's type, which for a tuple has blanks in it, before the operation's name.
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z][a-z0-9]*\[[0-9,]*\]")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one call of a compiled program needs on each chip.

    Attributes:
        arguments: bytes of the arguments.
        outputs: bytes of the results, those that take over an argument's buffer among them.
        aliased: bytes of results that take over an argument's buffer.
        temporary: bytes beside both.
        accessed: bytes read and written by all operations, as XLA counts them.
        operations: floating-point operations, as XLA counts them (a loop's body once).
        collectives: (operation, shapes of its results) to how often it stands in the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    accessed: float
    operations: float
    collectives: Counter[tuple[str, str]]

    @property
    def peak(self) -> int:
        """Bytes of a chip's memory while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Needs:
        memory = compiled.memory_analysis()
        assert memory is not None, "the compiler tells nothing of its memory"
        cost = compiled.cost_analysis() or {}
        return cls(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            accessed=float(cost.get("bytes accessed", 0.0)),
            operations=float(cost.get("flops", 0.0)),
            collectives=collectives(compiled.as_text() or ""),
        )


def collectives(text: str) -> Counter[tuple[str, str]]:
    """The collectives of a compiled program's text; see `Needs.collectives`."""
    return Counter(
        (operation, " ".join(_SHAPE.findall(shapes)))
        for shapes, operation in _COLLECTIVE.findall(text)
    )


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology such as "v5e:2x4", to compile for.

    Raises UserError where libtpu is missing or does not know the topology.
    """
    # Else libtpu asks the metadata server of a cloud machine for a minute.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Only a device needs a process of its own, not the compiler.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = str(error).strip().splitlines()[:1]
        raise UserError(
            f"topology {topology!r}: the TPU compiler does not answer ({' '.join(first)}); "
            "install sdjax[tpu], and name a topology such as v5e:2x4"
        ) from None
    return found.devices
