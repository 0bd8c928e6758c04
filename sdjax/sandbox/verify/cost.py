"""Cost of a program, computed from a jaxpr that the trusted side traced itself.

XLA's own analysis counts the body of a loop once, so it cannot be used. Here a scan counts once per
iteration, a `while` loop as if it ran to its iteration limit, and a branch as the most expensive
one. The unit is defined in primitive_costs.py.

XLA fuses a chain of elementwise operations into the loop over its result. If that result is larger,
as after a broadcast, a gather or a tile, it computes the chain again for each of its elements.
"""

import math
from collections import defaultdict
from dataclasses import astuple, dataclass
from typing import Any

from jax.extend import core

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.parameters import MAX_RANK
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.codegen_size import check_codegen_size, is_materialized
from sdjax.sandbox.verify.primitive_costs import primitive_cost, size, units_per_element

ITERATION_COST = 100  # units per loop iteration, in addition to its body and to its carry
COPIED_PER_UNIT = 16  # elements that a loop or a branch copies at the cost of one unit
STORED_PER_FUSED = 4  # time of an operation alone, relative to one within a fused chain


@dataclass(frozen=True)
class CostEstimate:
    """Cost of one jaxpr.

    Attributes:
        cost: units, see primitive_costs.py.
        memory: peak bytes alive at once, before XLA's fusion.
        iterations: total number of loop iterations.
    """

    cost: int
    memory: int
    iterations: int = 0


def estimate_cost(jaxpr: Any, limits: Limits, *, max_elements: int) -> CostEstimate:
    """Estimate the cost of a jaxpr, open or closed.

    Args:
        jaxpr: the jaxpr.
        limits: supplies the iteration limit of `while` loops.
        max_elements: maximum size of an intermediate array.

    Raises:
        Refusal: an intermediate array is too large, or XLA would generate too much code.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    check_codegen_size(jaxpr)
    last_use: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        last_use.update((v, index) for v in equation.invars if not isinstance(v, core.Literal))
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)} | set(jaxpr.invars)
    alive = sum(_num_bytes(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars))
    cost, peak, iterations = 0, alive, 0
    chains = _FusedChains()
    for index, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            _check_size(variable.aval, equation.primitive.name, max_elements)
        inner = _equation_cost(equation, limits, max_elements)
        cost += inner.cost + chains.recomputed(equation, inner.cost)
        iterations += inner.iterations
        alive += sum(_num_bytes(v.aval) for v in equation.outvars)
        peak = max(peak, alive + inner.memory)
        variables = (*equation.invars, *equation.outvars)
        for variable in {v for v in variables if not isinstance(v, core.Literal)}:
            if variable not in kept and last_use.get(variable, index) == index:
                alive -= _num_bytes(variable.aval)
    return CostEstimate(cost, peak, iterations)


def _equation_cost(equation: Any, limits: Limits, max_elements: int) -> CostEstimate:
    """Return the cost of one equation; `memory` counts only the arrays inside its sub-jaxprs."""
    name, params = equation.primitive.name, equation.params

    def of(body: Any) -> CostEstimate:
        return estimate_cost(body, limits, max_elements=max_elements)

    outs = [v.aval for v in equation.outvars]
    if name == "scan":
        # XLA may copy the carry, and the slices that the body reads and writes.
        body = params["jaxpr"]
        pairs = zip(equation.invars, body.in_avals, strict=True)
        slices = [inner for outer, inner in pairs if outer.aval.shape != inner.shape]
        return _repeated(of(body), size((*body.out_avals, *slices)), params["length"])
    if name == "while":
        test, body = of(params["cond_jaxpr"]), of(params["body_jaxpr"])
        both = CostEstimate(test.cost + body.cost, max(test.memory, body.memory), body.iterations)
        return _repeated(both, size(outs), limits.max_loop_iterations + 1)
    if name == "cond":
        branches = [astuple(of(branch)) for branch in params["branches"]]
        cost, memory, iterations = map(max, zip(*branches, strict=True))
        return CostEstimate(size(outs) // COPIED_PER_UNIT + cost, memory, iterations)
    if name == "jit":  # inside one of JAX's own public functions
        return of(params["jaxpr"])
    return CostEstimate(primitive_cost(name, [v.aval for v in equation.invars], outs, params), 0)


class _FusedChains:
    """Chains of operations that XLA fuses, as sets of equations in the bits of an integer."""

    def __init__(self) -> None:
        self._chains: dict[Any, int] = {}  # variable -> equations fused into it
        self._by_units: dict[int, int] = defaultdict(int)  # units per element -> equations
        self._count = 0

    def recomputed(self, equation: Any, cost: int) -> int:
        """Return the cost of chains that this equation computes again, and extend the chains.

        Args:
            equation: the next equation of the jaxpr.
            cost: its own cost.
        """
        name = equation.primitive.name
        if is_materialized(name) and name != "jit":
            return 0
        elements, again, chain = size([v.aval for v in equation.outvars]), 0, 1 << self._count
        for variable in equation.invars:
            fused = 0 if isinstance(variable, core.Literal) else self._chains.get(variable, 0)
            if fused and math.prod(variable.aval.shape) < elements:
                again += elements * self._units(fused) // STORED_PER_FUSED
            chain |= fused
        avals = [v.aval for v in equation.invars]
        units = cost / max(1, elements) if name == "jit" else units_per_element(name, avals)
        self._by_units[math.ceil(units)] |= 1 << self._count
        self._count += 1
        self._chains.update(dict.fromkeys(equation.outvars, chain))
        return again

    def _units(self, chain: int) -> int:
        return sum(u * (chain & members).bit_count() for u, members in self._by_units.items())


def _repeated(body: CostEstimate, copied: int, count: int) -> CostEstimate:
    """Return the cost of a loop that copies some elements per iteration."""
    cost = count * (body.cost + copied // COPIED_PER_UNIT + ITERATION_COST)
    return CostEstimate(cost, body.memory, count * (1 + body.iterations))


def _check_size(aval: Any, name: str, max_elements: int) -> None:
    if min(aval.shape, default=0) < 0:  # only possible in forged IR
        raise Refusal("refused", "ir", f"`{name}` makes an array with a negative dimension")
    # The length of each axis counts too, even if the array is empty.
    elements = max(math.prod(aval.shape), *aval.shape, 0)
    array = f"`{name}` makes an array of"
    if elements > max_elements:
        text = f"{array} {elements:.3g} elements; the limit is {max_elements:.3g}"
        raise Refusal("too costly", "elements", text)
    if len(aval.shape) > MAX_RANK:
        raise Refusal("too costly", "rank", f"{array} more than {MAX_RANK} axes")


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
