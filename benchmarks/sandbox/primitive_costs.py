"""Measure the processor time of every allowed primitive against the cost that it is charged.

    python -m benchmarks.sandbox.primitive_costs > benchmarks/sandbox/primitive_costs.md

Each primitive runs in a loop, as in a candidate, on several sets of operands and at two sizes,
compiled with the options of a run ("quick") or of a merge ("full"). The slowest set counts, since
the author of a candidate picks it. Time is the processor time of a single thread: the difference
between two numbers of iterations, minus that of a loop that does nothing. Cases are reported on
stderr as they are measured; `--only sort,svd` measures some of them.

The exit status is 1 if a case takes more than TOLERANCE times the median time per unit of cost, or
the slowest case of a primitive in one of its dtypes less than a TOLERANCE-th of it.
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

# A single thread, as in the sandbox: threads of OpenBLAS that wait for each other count as work.
os.environ.update(NPROC="1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.environment import describe_environment
from benchmarks.sandbox.array_cases import array_cases
from benchmarks.sandbox.cost_case import Case
from benchmarks.sandbox.elementwise_cases import elementwise_cases
from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW
from sdjax.sandbox.verify.cost import estimate_cost
from sdjax.sandbox.verify.primitive_costs import CALL
from sdjax.xla.compiler_options import quick_options

TOLERANCE = 10
SIZES = (1 << 12, 1 << 16)
STEPS = 8  # equations that one primitive becomes at most
SLOW_SECONDS = 0.02  # an iteration that takes longer is repeated only once
OPTIONS: dict[str, Callable] = {"quick": quick_options, "full": lambda: None}


def _spare(operand: Any) -> jax.Array:
    """Return the first element of an operand twice, along a new leading axis."""
    operand = jnp.asarray(operand)
    return jnp.tile(operand[(slice(1),) * operand.ndim], (2,) + (1,) * operand.ndim)


def _touch(operand: jax.Array, spare: jax.Array, i: jax.Array) -> jax.Array:
    """Write an equal element into the operand, so that nothing can be hoisted from the loop."""
    if not operand.size or not operand.ndim:
        return operand
    return lax.dynamic_update_slice(operand, spare[i % 2], (0,) * operand.ndim)


def _loop(
    step: Callable | None, start: list, count: jax.Array, operands: list, spares: list
) -> Any:
    def body(i: jax.Array, carry: tuple) -> tuple:
        xs, ys = carry
        xs = [_touch(x, spare, i) for x, spare in zip(xs, spares, strict=True)]
        return xs, lax.optimization_barrier(step(xs) if step else ys)

    return lax.fori_loop(0, count, body, (operands, start))


class Row(NamedTuple):
    """Cost and time of one case.

    Attributes:
        primitive: name of the primitive.
        dtype: that of the operands.
        label: what distinguishes the case from others of the primitive.
        size: number of elements that was asked for.
        cost: units that an application is charged.
        elements: size of the largest operand or result.
        moved: total size of operands and results; in several steps, of those of each.
        ordinary: nanoseconds on the first set of operands.
        worst: nanoseconds on the slowest set of operands.
    """

    primitive: str
    dtype: str
    label: str
    size: int
    cost: int
    elements: int
    moved: int
    ordinary: float
    worst: float

    @property
    def per_unit(self) -> float:
        """Nanoseconds per unit of cost, on the slowest set of operands."""
        return self.worst / self.cost

    @property
    def least(self) -> bool:
        """Whether the charge is at most a unit per element that is read or written."""
        return self.cost <= self.moved + CALL * STEPS


class Timer:
    """Times loops compiled with one set of options."""

    def __init__(self, options: Any, seconds: float):
        """Create a timer.

        Args:
            options: compiler options.
            seconds: processor time per measurement.
        """
        self.options, self.seconds = options, seconds
        self.empty: dict[Any, float] = {}

    def nanoseconds(self, step: Callable, inputs: list[list]) -> tuple[float, float]:
        """Return the time of one step on the first and on the slowest list of operands."""
        specs = [jax.typeof(x) for x in inputs[0]]
        results = jax.eval_shape(step, inputs[0])
        run = self._compile(step, specs, results)
        times = [self._time(run, operands) for operands in inputs]
        key = (tuple(map(str, specs)), tuple(map(str, results)))
        if key not in self.empty:
            self.empty[key] = self._time(self._compile(None, specs, results), inputs[0])
        return times[0] - self.empty[key], max(times) - self.empty[key]

    def _compile(self, step: Any, specs: list, results: list) -> Callable:
        def call(count: jax.Array, operands: list, spares: list) -> Any:
            start = [jnp.zeros(r.shape, r.dtype) for r in results]
            return _loop(step, start, count, operands, spares)

        counter = jax.ShapeDtypeStruct((), jnp.int32)
        spares = [jax.eval_shape(_spare, spec) for spec in specs]
        lowered = jax.jit(call).lower(counter, specs, spares)
        return lowered.compile(compiler_options=self.options)

    def _time(self, run: Callable, operands: list) -> float:
        """Return nanoseconds per iteration: the least of several slopes."""
        spares = [_spare(x) for x in operands]
        operands = [jnp.asarray(x) for x in operands]

        def once(count: int) -> float:
            argument = jnp.int32(count)
            start = time.process_time()
            jax.block_until_ready(run(argument, operands, spares))
            return time.process_time() - start

        once(1)
        base, count = once(1), 1
        slopes = [once(2) - base]
        while slopes[-1] * count < self.seconds and count < 1 << 20:
            factor = 1.3 * self.seconds / max(slopes[-1] * count, 1e-5)
            count = int(min(max(2, factor), 64) * count) + 1
            slopes.append((once(1 + count) - base) / count)
        repeats = 2 if slopes[-1] < SLOW_SECONDS else 1
        return 1e9 * min(slopes[-1], *((once(1 + count) - once(1)) / count for _ in range(repeats)))


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
    sizes = [math.prod(x.shape) for x in (*jaxpr.in_avals, *jaxpr.out_avals)]
    steps = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in (*e.invars, *e.outvars)]
    try:
        ordinary, worst = timer.nanoseconds(step, inputs)
    except OverflowError:  # cumlogsumexp of integers, whose initial value is infinite
        return None
    dtype = str(max(jaxpr.in_avals, key=lambda x: (x.dtype != "bool", x.size)).dtype)
    row = Row(
        primitive=case.primitive, dtype=dtype, label=case.label, size=size, cost=cost,
        elements=max(sizes), moved=sum(steps), ordinary=ordinary, worst=worst,
    )  # fmt: skip
    print(f"{row.primitive} {row.label}, {size}: {row.per_unit:.3f} ns/unit", file=sys.stderr)
    return row


def report(options: str, rows: list[Row]) -> list[str]:
    """Print the slowest case per primitive and dtype; return what is off.

    No operation is charged less than about a unit per element that it reads or writes, so one that
    is faster than that is not off.

    Args:
        options: name of the compiler options.
        rows: what was measured with them.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.per_unit):
        groups[row.primitive, row.dtype].append(row)
    median = statistics.median(group[-1].per_unit for group in groups.values())
    print(f"\nOptions: {options}. {len(rows)} cases, {len(groups)} primitives in their dtypes;")
    print(f"the median is {median:.2f} ns per unit.\n")
    print("| primitive | dtype | slowest case | elements | units per element | ns per element |"
          " ns, ordinary operands | ns per unit | ratio | ratio, fastest case |")  # fmt: skip
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    wrong = []
    for group in sorted(groups.values(), key=lambda group: -group[-1].per_unit):
        row, ratio = group[-1], group[-1].per_unit / median
        off = ratio > TOLERANCE or (ratio < 1 / TOLERANCE and not row.least)
        print(
            f"| {row.primitive} | {row.dtype} | {row.label} | {row.size:,}"
            f" | {row.cost / row.elements:.3g} | {row.worst / row.elements:.3g}"
            f" | {row.ordinary / row.elements:.3g} | {row.per_unit:.2f} | {ratio:.2f}"
            f" | {group[0].per_unit / median:.2f} |"
        )
        if off:
            text = f"{row.cost} units, {row.worst:.0f} ns, {ratio:.2f} times the median"
            wrong.append(f"{row.primitive} {row.label} ({options}, {row.size} elements): {text}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="comma-separated names of primitives")
    parser.add_argument("--options", default="quick")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seconds", type=float, default=0.001)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    present = {name for name, entry in ALLOWED.items() if entry.bind}
    cases = [*elementwise_cases(), *array_cases()]
    if missing := present - {case.primitive for case in cases}:
        sys.exit(f"no case for {', '.join(sorted(missing))}")
    only = set(arguments.only.split(",")) if arguments.only else {*present, *CONTROL_FLOW}
    print(describe_environment(), flush=True)
    rows: dict[str, list[Row]] = defaultdict(list)
    for options in arguments.options.split(","):
        timer = Timer(OPTIONS[options](), arguments.seconds)
        for size in map(int, arguments.sizes.split(",")):
            for case in cases:
                if case.primitive in only and (row := measure(case, size, timer)):
                    rows[options].append(row)
    wrong = [text for key, group in rows.items() for text in report(key, group)]
    print(
        "\n"
        + "\n".join(wrong or [f"Every primitive is within a factor of {TOLERANCE} of the median."])
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
