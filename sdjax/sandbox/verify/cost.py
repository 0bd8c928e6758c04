"""What a program costs, counted in a jaxpr that the trusted side traced itself.

XLA's own analysis counts a loop's body once, so it cannot be the gate: here a scan's body counts
as often as it runs, a `while` for all of its fuel, a branch as the dearest one.
"""

import math
from dataclasses import dataclass
from typing import Any

from jax.extend import core

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.parameters import MAX_RANK
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.codegen_size import check_copies

ROUND = 1_000  # what one round of a loop costs whatever it does, in scalar operations


@dataclass(frozen=True)
class CostEstimate:
    """Scalar operations, the largest sum of bytes alive at once (before XLA's fusion), and the
    iterations of all loops one after the other."""

    cost: int
    memory: int
    iterations: int = 0


def estimate_cost(closed: Any, limits: Limits, *, most_elements: int) -> CostEstimate:
    """The bill of a closed jaxpr; Refusal where an intermediate is larger than `most_elements`."""
    return _estimate(closed.jaxpr, limits, most_elements)


def _estimate(jaxpr: Any, limits: Limits, most_elements: int) -> CostEstimate:
    check_copies(jaxpr)
    last_use: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        last_use.update((v, index) for v in equation.invars if not isinstance(v, core.Literal))
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)} | set(jaxpr.invars)
    alive = sum(_bytes(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars))
    cost, peak, iterations = 0, alive, 0
    for index, equation in enumerate(jaxpr.eqns):
        for variable in equation.outvars:
            _check_size(variable.aval, equation.primitive.name, most_elements)
        inner = _inner(equation, limits, most_elements)
        cost += inner.cost
        iterations += inner.iterations
        alive += sum(_bytes(v.aval) for v in equation.outvars)
        peak = max(peak, alive + inner.memory)
        for variable in _vars(equation):
            if variable not in kept and last_use.get(variable, index) == index:
                alive -= _bytes(variable.aval)
    return CostEstimate(cost, peak, iterations)


def _vars(equation: Any) -> set[Any]:
    """The variables that may die at this equation: what it reads, and results nobody reads."""
    return {v for v in (*equation.invars, *equation.outvars) if not isinstance(v, core.Literal)}


def _inner(equation: Any, limits: Limits, most_elements: int) -> CostEstimate:
    """One equation's own bill: operations, and bytes inside its sub-programs."""
    name, params = equation.primitive.name, equation.params

    def of(body: Any) -> CostEstimate:
        return _estimate(getattr(body, "jaxpr", body), limits, most_elements)

    if name == "scan":
        body, length = of(params["jaxpr"]), params["length"]
        return CostEstimate(
            length * (body.cost + ROUND), body.memory, length * (1 + body.iterations)
        )
    if name == "while":
        condition, body = of(params["cond_jaxpr"]), of(params["body_jaxpr"])
        each, most = condition.cost + body.cost + ROUND, limits.max_loop_iterations + 1
        memory = max(condition.memory, body.memory)
        return CostEstimate(most * each, memory, most * (1 + body.iterations))
    if name == "cond":
        branches = [of(branch) for branch in params["branches"]]
        cost, memory = max(b.cost for b in branches), max(b.memory for b in branches)
        return CostEstimate(cost + 1, memory, max(b.iterations for b in branches))
    if "jaxpr" in params:  # a `jit` within one of JAX's own public functions
        return of(params["jaxpr"])
    ins = [v.aval for v in equation.invars]
    outs = [v.aval for v in equation.outvars]
    entry = ALLOWED.get(name)
    operations = entry.cost(ins, outs, params) if entry else sum(math.prod(a.shape) for a in outs)
    return CostEstimate(operations + 1, 0)


def _check_size(aval: Any, name: str, most_elements: int) -> None:
    if min(aval.shape, default=0) < 0:  # only a forged message says so
        raise Refusal("refused", "ir", f"`{name}` makes an array with a negative axis")
    found = max(math.prod(aval.shape), *aval.shape, 0)  # an axis counts even beside an empty one
    if found > most_elements:
        raise Refusal(
            "too costly",
            "elements",
            f"`{name}` makes an array of {found:.3g} elements; {most_elements:.3g} are allowed",
        )
    if len(aval.shape) > MAX_RANK:
        raise Refusal("too costly", "rank", f"`{name}` makes an array of more than {MAX_RANK} axes")


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
