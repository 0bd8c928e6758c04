"""While loops that recompute cheap values in every pass instead of storing them.

Selection by magnitude passes about five times over |expert - base|. XLA hoists loop-invariant
values out of a loop and stores them: here in float32, twice the bytes of the weights, in new pages
whose faults take longer than the passes. The loop therefore gets the weights themselves, behind an
optimization barrier that prevents the hoisting. Slices are taken of the weights for the same
reason: a slice of the difference would make XLA store the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

# Elementwise and cheap; no two of them fuse into one operation, so they round identically
# wherever they are computed.
_CHEAP = frozenset({"convert_element_type", "sub", "abs", "bitcast_convert_type"})

# The cheap equations that compute a variable from the arguments, in order.
_Chain = tuple[core.JaxprEqn, ...]
_Values = Mapping[core.Var, Any]


def rematerialize(function: Callable) -> Callable:
    """Return a function with bit-identical results whose loops and slices read its arguments."""

    def rematerialized(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not any(equation.primitive.name == "while" for equation in closed.eqns):
            return function(*arguments)
        results = _Interpreter(closed, jax.tree.leaves(arguments)).run()
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rematerialized


class _Interpreter:
    """Interpreter that evaluates the equations of a jaxpr one by one."""

    def __init__(self, closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> None:
        self._jaxpr = closed.jaxpr
        self._values: dict[core.Var, Any] = {
            **dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)),
            **dict(zip(closed.jaxpr.invars, arguments, strict=True)),
        }
        self._chains: dict[core.Var, _Chain] = dict.fromkeys(closed.jaxpr.invars, ())

    def run(self) -> list[Any]:
        for equation in self._jaxpr.eqns:
            inputs = _variables(equation.invars)
            if equation.primitive.name in _CHEAP and all(var in self._chains for var in inputs):
                chain = [step for var in inputs for step in self._chains[var]]
                self._chains[equation.outvars[0]] = tuple(dict.fromkeys([*chain, equation]))
            if equation.primitive.name == "while":
                results = self._while(equation)
            elif equation.primitive.name == "slice":
                results = self._slice(equation)
            else:
                results = self._evaluate([equation], self._values)
            self._values.update(zip(equation.outvars, results, strict=True))
        return self._read(self._jaxpr.outvars)

    def _slice(self, equation: core.JaxprEqn) -> Sequence[Any]:
        """Slice the inputs of the operand's chain, and apply the chain to the slices."""
        (operand,) = equation.invars
        chain = self._chain(operand)
        if not chain:
            return self._evaluate([equation], self._values)
        slices = {
            var: equation.primitive.bind(self._values[var], **equation.params)
            for var in _inputs(chain)
        }
        return self._evaluate(chain, slices)

    def _while(self, equation: core.JaxprEqn) -> Sequence[Any]:
        """Recompute the body's constants from the inputs of their chains in every pass."""
        num_cond = equation.params["cond_nconsts"]
        num_consts = num_cond + equation.params["body_nconsts"]
        cond_consts = self._read(equation.invars[:num_cond])
        body_consts = equation.invars[num_cond:num_consts]
        initial = self._read(equation.invars[num_consts:])
        cond = core.jaxpr_as_fun(equation.params["cond_jaxpr"])
        body = core.jaxpr_as_fun(equation.params["body_jaxpr"])
        chains = [self._chain(var) for var in body_consts]
        weights = _variables([var for chain in chains for var in _inputs(chain)])

        def rematerialized_body(carry: Sequence[Any]) -> Sequence[Any]:
            inputs = [self._values[var] for var in weights]
            inputs, carry = jax.lax.optimization_barrier((inputs, carry))
            values = dict(zip(weights, inputs, strict=True))
            consts = [
                self._evaluate(chain, values)[0] if chain else self._read([var])[0]
                for var, chain in zip(body_consts, chains, strict=True)
            ]
            return body(*consts, *carry)

        return jax.lax.while_loop(
            lambda carry: cond(*cond_consts, *carry)[0], rematerialized_body, initial
        )

    def _chain(self, var: core.Var | core.Literal) -> _Chain:
        return () if isinstance(var, core.Literal) else self._chains.get(var, ())

    def _evaluate(self, equations: Sequence[core.JaxprEqn], values: _Values) -> Sequence[Any]:
        """Evaluate consecutive equations and return the results of the last one."""
        inputs = _inputs(equations)
        jaxpr = self._jaxpr.replace(
            constvars=(), invars=inputs, outvars=equations[-1].outvars, eqns=list(equations)
        )
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*(values[var] for var in inputs))

    def _read(self, variables: Sequence[core.Var | core.Literal]) -> list[Any]:
        return [v.val if isinstance(v, core.Literal) else self._values[v] for v in variables]


def _inputs(equations: Sequence[core.JaxprEqn]) -> list[core.Var]:
    """Return the distinct variables that the equations read and do not compute."""
    computed = {var for equation in equations for var in equation.outvars}
    read = _variables([var for equation in equations for var in equation.invars])
    return [var for var in read if var not in computed]


def _variables(atoms: Sequence[core.Var | core.Literal]) -> list[core.Var]:
    """Return the distinct variables among variables and literals."""
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, core.Literal)))
