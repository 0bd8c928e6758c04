"""Cost of a program, computed from a jaxpr that the trusted side traced itself.

XLA's own analysis counts the body of a loop once, so it cannot be used. Here a scan counts once per
iteration, a `while` loop as if it ran to its iteration limit, and a branch as the most expensive
one.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax.extend import core

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.parameters import MAX_RANK
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.codegen_size import check_codegen_size

ITERATION_COST = 1_000  # scalar operations charged per loop iteration in addition to its body


@dataclass(frozen=True)
class CostEstimate:
    """Cost of one jaxpr.

    Attributes:
        cost: scalar operations.
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
    for index, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            _check_size(variable.aval, equation.primitive.name, max_elements)
        inner = _equation_cost(equation, limits, max_elements)
        cost += inner.cost
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

    if name == "scan":
        return _repeated(of(params["jaxpr"]), params["length"])
    if name == "while":
        condition, body = of(params["cond_jaxpr"]), of(params["body_jaxpr"])
        memory = max(condition.memory, body.memory)
        both = CostEstimate(condition.cost + body.cost, memory, body.iterations)
        return _repeated(both, limits.max_loop_iterations + 1)
    if name == "cond":
        branches = [of(branch) for branch in params["branches"]]
        return CostEstimate(
            cost=1 + max(branch.cost for branch in branches),
            memory=max(branch.memory for branch in branches),
            iterations=max(branch.iterations for branch in branches),
        )
    ins = [v.aval for v in equation.invars]
    outs = [v.aval for v in equation.outvars]
    entry = ALLOWED.get(name)
    if entry is None and "jaxpr" in params:  # `jit` inside one of JAX's own public functions
        return of(params["jaxpr"])
    operations = entry.cost(ins, outs, params) if entry else sum(math.prod(a.shape) for a in outs)
    return CostEstimate(operations + 1, 0)


def _repeated(body: CostEstimate, count: int) -> CostEstimate:
    """Return the cost of a loop."""
    return CostEstimate(
        count * (body.cost + ITERATION_COST), body.memory, count * (1 + body.iterations)
    )


def _check_size(aval: Any, name: str, max_elements: int) -> None:
    if min(aval.shape, default=0) < 0:  # only possible in forged IR
        raise Refusal("refused", "ir", f"`{name}` makes an array with a negative dimension")
    # The length of each axis counts too, even if the array is empty.
    elements = max(math.prod(aval.shape), *aval.shape, 0)
    if elements > max_elements:
        raise Refusal(
            "too costly",
            "elements",
            f"`{name}` makes an array of {elements:.3g} elements; the limit is {max_elements:.3g}",
        )
    if len(aval.shape) > MAX_RANK:
        raise Refusal("too costly", "rank", f"`{name}` makes an array of more than {MAX_RANK} axes")


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
