"""Devices of a TPU that is not present, and the resource usage of executables for them.

libtpu's compiler runs on any Linux machine. It provides the devices of a named topology, for which
`jax.jit(...).lower(...).compile()` works as usual. The executable reports its memory per chip, the
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
# The type of the result (a tuple's contains spaces), then the name of the operation.
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z][a-z0-9]*\[[0-9,]*\]")


@dataclass(frozen=True, kw_only=True)
class ResourceUsage:
    """Resource usage per chip of one call of an executable.

    Attributes:
        arguments: Bytes of the arguments.
        outputs: Bytes of the results, including those that reuse the buffer of an argument.
        aliased: Bytes of the results that reuse the buffer of an argument.
        temporary: Bytes in addition to arguments and results.
        accessed: Bytes read and written by all operations, as counted by XLA.
        operations: Floating-point operations, as counted by XLA (loop bodies once).
        collectives: Number of occurrences of each (operation, result shapes) in the executable.
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
        """Bytes of a chip's memory that are in use while the executable runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> ResourceUsage:
        """Read the usage from the compiler's analyses of an executable."""
        memory = compiled.memory_analysis()
        assert memory is not None, "the compiler reports no memory analysis"
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


def collectives(hlo: str) -> Counter[tuple[str, str]]:
    """Count the collectives in an executable's HLO text; see `ResourceUsage.collectives`."""
    return Counter(
        (operation, " ".join(_SHAPE.findall(shapes)))
        for shapes, operation in _COLLECTIVE.findall(hlo)
    )


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """Return the devices of a TPU topology such as "v5e:2x4" as compilation targets.

    Raises:
        UserError: libtpu is missing or does not know the topology.
    """
    # Without this, libtpu waits a minute for the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Only a device must belong to a single process; the compiler need not.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise UserError(
            f"topology {topology!r}: the TPU compiler is unavailable ({' '.join(first_line)}); "
            "install sdjax[tpu] and use a topology such as v5e:2x4"
        ) from None
    return description.devices
