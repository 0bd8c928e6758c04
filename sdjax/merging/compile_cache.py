"""Compiled merge programs, kept as long as they are of use.

A search compiles thousands of programs and uses most of them once, so they are compiled ahead of
time and held here and nowhere else: dropping one from this cache frees its executable.
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

# From this many elements on, one operation is worth being divided among the cores.
LARGE = 2**22

_FOLDS = re.compile(r"stablehlo\.(reduce|while|sort|gather|dot_general)\b")
_FUNCTIONS = re.compile(
    r"(stablehlo|chlo)\.(exp|log|sin|cos|tan|tanh|pow|atan|a?sinh?|a?cosh?|erf)\w* .*tensor<\d+x\d"
)


def compile_for_single_use(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """A program for a merge from disk, which runs once a tensor, and with another beside it.

    On a CPU, XLA's fusion emitters double the time to compile. They divide every operation among
    the cores, where without them only maps are divided, and are faster at functions such as exp;
    so large folds and functions are compiled with them. The results are those of ``Programs``, but
    for the last bit of float32.
    """
    text, shapes = lowered.as_text(), [x.shape for x in jax.tree.leaves(lowered.args_info)]
    large = max(map(math.prod, shapes), default=0) >= LARGE
    emitters = (large and _FOLDS.search(text)) or _FUNCTIONS.search(text)
    lean = jax.default_backend() == "cpu" and not emitters
    return lowered.compile(compiler_options=lean_options() if lean else None)


class Program(Protocol):
    """Something to be compiled, and the key under which it is kept."""

    @property
    def cache_key(self) -> tuple: ...

    @property
    def lower(self) -> Callable[[], jax.stages.Lowered]: ...


class MemoryLimitExceeded(Exception):
    """A compiled program takes more temporary memory than its caller allows."""


class CompileCache:
    """A least-recently-used cache of compiled programs.

    capacity: executables kept. quick: spend less on optimising code, for programs that run a few
        times over small tensors (on the CPU: compiled in less than half the time, and two to three
        times slower; no effect elsewhere). Results may differ in the last bit of float32 between
        quick and not, so a run keeps to one of them.
    """

    def __init__(self, *, capacity: int = 64, quick: bool = False) -> None:
        self.capacity = capacity
        self.quick = quick
        self.compiled = 0  # how many were compiled so far
        self._kept: OrderedDict[tuple, jax.stages.Compiled] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[jax.stages.Compiled]:
        """The programs kept, least recently used first."""
        return iter(self._kept.values())

    def clear(self) -> None:
        """Drop every program."""
        self._kept.clear()

    def get(
        self, wanted: Sequence[Program], max_memory: int | None = None
    ) -> list[jax.stages.Compiled]:
        """The compiled programs, in the order asked for; new ones are compiled side by side.

        Raises MemoryLimitExceeded where one takes more than ``max_memory`` bytes of a device beside
        its arguments and results.
        """
        missing = {p.cache_key: p for p in wanted if p.cache_key not in self._kept}
        # Tracing holds the interpreter's lock, compiling does not.
        lowered = [program.lower() for program in missing.values()]
        fresh = dict(zip(missing, self._compile(lowered), strict=True))
        self.compiled += len(fresh)
        found = {p.cache_key: fresh.get(p.cache_key) or self._kept[p.cache_key] for p in wanted}
        for key, program in found.items():
            self._kept[key] = program
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        if max_memory is not None and any(_memory(p) > max_memory for p in found.values()):
            raise MemoryLimitExceeded
        return [found[program.cache_key] for program in wanted]

    def _compile(self, lowered: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
        options = quick_options() if self.quick and jax.default_backend() == "cpu" else None

        def compile_one(program: jax.stages.Lowered) -> jax.stages.Compiled:
            return program.compile(compiler_options=options)

        if len(lowered) < 2:
            return [compile_one(program) for program in lowered]
        with ThreadPoolExecutor(max_workers=min(4, len(lowered))) as pool:
            return list(pool.map(compile_one, lowered))


def _memory(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program takes beside its arguments and results."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes
