"""Measure the processor time of every allowed primitive against the cost that it is charged.

    python benchmarks/sandbox/primitive_costs.py

Each primitive runs in a loop, as in a candidate, on the slowest of several sets of operands, at
two sizes, compiled with the options of a run ("quick") or of a merge ("full"). Time is the
processor time of a single thread: the difference between two numbers of iterations, minus that of
a loop that does nothing. The exit status is 1 if a primitive takes more than TOLERANCE times the
median time per unit of cost, or less than a TOLERANCE-th of it.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["NPROC"] = "1"  # threads of XLA

import jax
import jax.numpy as jnp
from array_cases import array_cases
from cost_case import Case
from elementwise_cases import elementwise_cases
from jax import lax

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW
from sdjax.sandbox.verify.cost import estimate_cost
from sdjax.sandbox.verify.primitive_costs import CALL
from sdjax.xla.compiler_options import quick_options

TOLERANCE = 10
SIZES = (1 << 12, 1 << 16)
OPTIONS: dict[str, Callable] = {"quick": quick_options, "full": lambda: None}


def _touch(operand: jax.Array, i: jax.Array) -> jax.Array:
    """Change one element, so that nothing can be hoisted from the loop, and values stay alike."""
    if not operand.size or not operand.ndim:
        return operand
    source = [(7 * i) % n for n in operand.shape]
    target = [(3 * i + 1) % n for n in operand.shape]
    element = lax.dynamic_slice(operand, source, (1,) * operand.ndim)
    return lax.dynamic_update_slice(operand, element, target)


def _loop(step: Callable[[list], list], start: list, count: jax.Array, operands: list) -> Any:
    def body(i: jax.Array, carry: tuple) -> tuple:
        xs, ys = carry
        xs = [_touch(x, i) for x in xs]
        return xs, lax.optimization_barrier(step(xs) if step else ys)

    return lax.fori_loop(0, count, body, (operands, start))


class Row(NamedTuple):
    """Cost and time of one case; `elements` counts operands and results."""

    primitive: str
    label: str
    cost: int
    elements: int
    nanoseconds: float

    @property
    def per_unit(self) -> float:
        """Nanoseconds per unit of cost."""
        return self.nanoseconds / self.cost


class Timer:
    """Times loops compiled with one set of options."""

    def __init__(self, options: Any, seconds: float):
        """Create a timer.

        Args:
            options: compiler options.
            seconds: processor time to measure for.
        """
        self.options, self.seconds = options, seconds
        self.empty: dict[Any, float] = {}

    def nanoseconds(self, step: Callable, inputs: list[list]) -> float:
        """Return the time of one step, on the slowest of several lists of operands."""
        specs = [jax.typeof(x) for x in inputs[0]]
        results = jax.eval_shape(step, inputs[0])
        run = self._compile(step, specs, results)
        times = [self._time(run, xs, self.seconds / 4) for xs in inputs]
        slowest = inputs[times.index(max(times))]
        best = min(self._time(run, slowest, self.seconds) for _ in range(3))
        key = (tuple(map(str, specs)), tuple(map(str, results)))
        if key not in self.empty:
            nothing = self._compile(None, specs, results)
            self.empty[key] = min(self._time(nothing, slowest, self.seconds) for _ in range(3))
        return best - self.empty[key]

    def _compile(self, step: Any, specs: list, results: list) -> Callable:
        def call(count: jax.Array, operands: list) -> Any:
            start = [jnp.zeros(r.shape, r.dtype) for r in results]
            return _loop(step, start, count, operands)

        spec = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(call).lower(spec, specs).compile(compiler_options=self.options)

    def _time(self, run: Callable, operands: list, seconds: float) -> float:
        """Return nanoseconds per iteration: the slope between two numbers of iterations."""
        operands = [jnp.asarray(x) for x in operands]

        def once(count: int) -> float:
            argument = jnp.int32(count)
            start = time.process_time()
            jax.block_until_ready(run(argument, operands))
            return time.process_time() - start

        once(1)
        base, count = once(1), 1
        while (spent := once(1 + count)) - base < seconds and count < 1 << 20:
            factor = 1.3 * seconds / max(spent - base, 1e-5)
            count = int(min(max(2, factor), 64) * count) + 1
        return 1e9 * (spent - base) / count


def measure(case: Case, size: int, timer: Timer) -> Row | None:
    """Measure a case; return None if JAX has no such operation."""
    inputs = [case.make(size, kinds) for kinds in case.values]

    def step(xs: list) -> list:
        return case.run(xs)

    try:
        jaxpr = jax.make_jaxpr(step)(inputs[0])
    except (TypeError, ValueError, NotImplementedError, OverflowError):  # not for this dtype
        return None
    if not jaxpr.eqns:  # a conversion to the same dtype
        return None
    cost = estimate_cost(jaxpr, Limits(), max_elements=1 << 40).cost
    elements = sum(math.prod(x.shape) for x in (*jaxpr.in_avals, *jaxpr.out_avals))
    try:
        nanoseconds = timer.nanoseconds(step, inputs)
    except OverflowError:  # cumlogsumexp of integers, whose initial value is infinite
        return None
    print(f"{case.primitive} {case.label}: {nanoseconds / cost:.3f} ns/unit", file=sys.stderr)
    return Row(case.primitive, case.label, cost, elements, nanoseconds)


def report(options: str, size: int, group: list[Row]) -> list[str]:
    """Print the slowest case per primitive; return the cases that are off by more than TOLERANCE.

    No operation is charged less than about a unit per element that it reads or writes, so one that
    is faster than that is not off.
    """
    median = statistics.median(row.per_unit for row in group)
    slowest: dict[str, Row] = {}
    for row in sorted(group, key=lambda row: row.per_unit):
        slowest[row.primitive] = row
    print(f"\n{options}, {size} elements: {len(group)} cases, median {median:.2f} ns per unit\n")
    print("| primitive, slowest case | cost | ns | ns per unit | over the median |")
    print("|---|---:|---:|---:|---:|")
    for row in sorted(slowest.values(), key=lambda row: -row.per_unit):
        print(
            f"| {' '.join(row[:2])} | {row.cost:,} | {row.nanoseconds:,.0f}"
            f" | {row.per_unit:.2f} | {row.per_unit / median:.2f} |"
        )
    wrong = []
    for row in group:
        ratio, least = (
            row.per_unit / median,
            row.cost <= 4 * (row.elements + CALL),
        )
        if ratio > TOLERANCE or (ratio < 1 / TOLERANCE and not least):
            text = f"{row.cost} units, {row.nanoseconds:.0f} ns, {ratio:.2f} times the median"
            wrong.append(f"{row.primitive} {row.label} ({options}, {size} elements): {text}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="comma-separated names of primitives")
    parser.add_argument("--options", default="quick")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seconds", type=float, default=0.002)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    present = {name for name, entry in ALLOWED.items() if entry.bind}
    cases = [*elementwise_cases(), *array_cases()]
    if missing := present - {case.primitive for case in cases}:
        sys.exit(f"no case for {', '.join(sorted(missing))}")
    only = set(arguments.only.split(",")) if arguments.only else {*present, *CONTROL_FLOW}
    rows: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for options in arguments.options.split(","):
        timer = Timer(OPTIONS[options](), arguments.seconds)
        for size in map(int, arguments.sizes.split(",")):
            for case in cases:
                if case.primitive in only and (row := measure(case, size, timer)):
                    rows[options, size].append(row)
    wrong = [text for key, group in rows.items() for text in report(*key, group)]
    print("\n" + "\n".join(wrong or ["every primitive is within a factor of ten of the median"]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
