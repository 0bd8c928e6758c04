"""Compiled merges and the cache that keeps them.

A search compiles thousands of merges and uses most of them only once. They are therefore compiled
ahead of time and referenced only from this cache: evicting an entry frees its executable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax

from sdjax.sharding.memory import MemoryLimitExceeded, memory_analysis
from sdjax.xla.compiler_options import quick_options


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
        self, computations: Sequence[Lowerable], max_memory: int | None = None
    ) -> list[jax.stages.Compiled]:
        """Return the executables of these computations; compile missing ones in parallel.

        Args:
            computations: the computations.
            max_memory: limit on each executable's temporary memory per device, in bytes.

        Raises:
            MemoryLimitExceeded: an executable needs more memory.
        """
        missing = {c.cache_key: c for c in computations if c.cache_key not in self._executables}
        # Tracing holds the interpreter lock; compilation does not.
        lowered = [computation.lower() for computation in missing.values()]
        new = dict(zip(missing, self._compile(lowered), strict=True))
        self.compiled += len(new)
        found = {
            c.cache_key: new.get(c.cache_key) or self._executables[c.cache_key]
            for c in computations
        }
        for key, executable in found.items():
            self._executables[key] = executable
            self._executables.move_to_end(key)
        while len(self._executables) > self.capacity:
            self._executables.popitem(last=False)
        temporary = max(map(_temp_memory, found.values()), default=0)
        if max_memory is not None and temporary > max_memory:
            raise MemoryLimitExceeded(
                f"the compiled merge needs {temporary / 1e9:.3g} GB of temporary memory; the limit "
                f"is {max_memory / 1e9:.3g} GB"
            )
        return [found[computation.cache_key] for computation in computations]

    def _compile(self, lowered: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
        options = quick_options() if self.quick and jax.default_backend() == "cpu" else None

        def compile_one(one: jax.stages.Lowered) -> jax.stages.Compiled:
            return one.compile(compiler_options=options)

        if len(lowered) < 2:
            return [compile_one(one) for one in lowered]
        with ThreadPoolExecutor(max_workers=min(4, len(lowered))) as pool:
            return list(pool.map(compile_one, lowered))


def _temp_memory(executable: jax.stages.Compiled) -> int:
    """Return the bytes that an executable needs in addition to its arguments and results."""
    analysis = memory_analysis(executable)
    return 0 if analysis is None else analysis.temp_size_in_bytes
