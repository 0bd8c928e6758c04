"""Compiled merges and the cache that keeps them.

A search compiles thousands of merges and uses most of them only once. They are therefore compiled
ahead of time and referenced only from this cache: evicting an entry frees its executable.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax

from sdjax.xla.compiler_options import lean_options, quick_options

# Number of elements above which splitting an operation across the cores pays off.
LARGE = 2**22

_REDUCTIONS = re.compile(r"stablehlo\.(reduce|while|sort|gather|dot_general)\b")
_TRANSCENDENTALS = re.compile(
    r"(stablehlo|chlo)\.(exp|log|sin|cos|tan|tanh|pow|atan|a?sinh?|a?cosh?|erf)\w* .*tensor<\d+x\d"
)


class MemoryLimitExceeded(Exception):
    """Raised when an executable needs more temporary memory than its caller allows."""


class Lowerable(Protocol):
    """A computation that can be compiled, with the key under which its executable is cached."""

    @property
    def cache_key(self) -> tuple:
        """Return the key: computations with the same key share an executable."""
        ...

    @property
    def lower(self) -> Callable[[], jax.stages.Lowered]:
        """Return the function that traces and lowers the computation."""
        ...


def compile_for_single_use(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile for a merge from disk, in which an executable runs only a few times.

    On a CPU, XLA's fusion emitters double the compile time. With them every operation is split
    across the cores, not only elementwise ones, and functions such as exp are faster. They are
    therefore used for large reductions and for such functions. Results equal those of
    `CompileCache` up to the last bit of float32.
    """
    text, shapes = lowered.as_text(), [x.shape for x in jax.tree.leaves(lowered.args_info)]
    large = max(map(math.prod, shapes), default=0) >= LARGE
    emitters = (large and _REDUCTIONS.search(text)) or _TRANSCENDENTALS.search(text)
    lean = jax.default_backend() == "cpu" and not emitters
    return lowered.compile(compiler_options=lean_options() if lean else None)


class CompileCache:
    """Least-recently-used cache of executables.

    Attributes:
        capacity: maximum number of executables.
        quick: whether less effort is spent on optimization.
        compiled: number of compilations so far.
    """

    def __init__(self, *, capacity: int = 64, quick: bool = False) -> None:
        """Create an empty cache.

        Args:
            capacity: maximum number of executables.
            quick: spend less effort on optimization, for small tensors and few runs. On a CPU this
                halves the compile time and makes executables two to three times slower; elsewhere
                it has no effect. The last bit of float32 may differ, so a run uses one setting
                throughout.
        """
        self.capacity = capacity
        self.quick = quick
        self.compiled = 0
        self._executables: OrderedDict[tuple, jax.stages.Compiled] = OrderedDict()

    def __len__(self) -> int:
        return len(self._executables)

    def __iter__(self) -> Iterator[jax.stages.Compiled]:
        """Iterate over the executables, least recently used first."""
        return iter(self._executables.values())

    def clear(self) -> None:
        """Remove all executables."""
        self._executables.clear()

    def get(
        self, programs: Sequence[Lowerable], max_memory: int | None = None
    ) -> list[jax.stages.Compiled]:
        """Return the executables of these computations; compile missing ones in parallel.

        Args:
            programs: the computations.
            max_memory: limit on each executable's temporary memory per device, in bytes.

        Raises:
            MemoryLimitExceeded: an executable needs more memory.
        """
        missing = {p.cache_key: p for p in programs if p.cache_key not in self._executables}
        # Tracing holds the interpreter lock; compilation does not.
        lowered = [program.lower() for program in missing.values()]
        new = dict(zip(missing, self._compile(lowered), strict=True))
        self.compiled += len(new)
        found = {
            p.cache_key: new.get(p.cache_key) or self._executables[p.cache_key] for p in programs
        }
        for key, executable in found.items():
            self._executables[key] = executable
            self._executables.move_to_end(key)
        while len(self._executables) > self.capacity:
            self._executables.popitem(last=False)
        if max_memory is not None and any(_temp_memory(e) > max_memory for e in found.values()):
            raise MemoryLimitExceeded
        return [found[program.cache_key] for program in programs]

    def _compile(self, lowered: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
        options = quick_options() if self.quick and jax.default_backend() == "cpu" else None

        def compile_one(program: jax.stages.Lowered) -> jax.stages.Compiled:
            return program.compile(compiler_options=options)

        if len(lowered) < 2:
            return [compile_one(program) for program in lowered]
        with ThreadPoolExecutor(max_workers=min(4, len(lowered))) as pool:
            return list(pool.map(compile_one, lowered))


def _temp_memory(executable: jax.stages.Compiled) -> int:
    """Return the bytes that an executable needs in addition to its arguments and results."""
    analysis = executable.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes
