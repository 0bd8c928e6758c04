"""Loops that compute task vectors anew in each pass, rather than read them from memory.

Selection by magnitude passes over |expert - base| some five times. XLA moves whatever a loop does
not change out of it and stores it: in float32, twice the bytes of the weights that it comes of, in
fresh pages whose faults take longer than the passes. A loop is given the weights instead, behind a
barrier that XLA moves nothing across. The sample is one of weights for the same reason: if it read
the difference, that would be stored for the sample and for the result to share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

# Elementwise and cheap, and no two of them are fused: they round alike wherever they are computed.
_ANEW = frozenset({"convert_element_type", "sub", "abs", "bitcast_convert_type"})

# How a variable is made of the arguments by such equations, in order: nothing for an argument.
_Chain = tuple[core.JaxprEqn, ...]
_Values = Mapping[core.Var, Any]


def rematerialised(function: Callable) -> Callable:
    """The same function, bit for bit, whose while loops and slices read its arguments."""

    def anew(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not any(equation.primitive.name == "while" for equation in closed.eqns):
            return function(*arguments)
        results = _Evaluation(closed, jax.tree.leaves(arguments)).results()
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return anew


class _Evaluation:
    """A function's equations, carried out one after the other."""

    def __init__(self, closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> None:
        self._jaxpr = closed.jaxpr
        self._values: dict[core.Var, Any] = {
            **dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)),
            **dict(zip(closed.jaxpr.invars, arguments, strict=True)),
        }
        self._chains: dict[core.Var, _Chain] = dict.fromkeys(closed.jaxpr.invars, ())

    def results(self) -> list[Any]:
        for equation in self._jaxpr.eqns:
            variables = _variables(equation.invars)
            if equation.primitive.name in _ANEW and all(var in self._chains for var in variables):
                before = [each for var in variables for each in self._chains[var]]
                self._chains[equation.outvars[0]] = tuple(dict.fromkeys([*before, equation]))
            if equation.primitive.name == "while":
                found = self._loop(equation)
            elif equation.primitive.name == "slice":
                found = self._slice(equation)
            else:
                found = self._run([equation], self._values)
            self._values.update(zip(equation.outvars, found, strict=True))
        return self._read(self._jaxpr.outvars)

    def _slice(self, equation: core.JaxprEqn) -> Sequence[Any]:
        """A slice of what a chain makes, which is what it makes of slices."""
        (var,) = equation.invars
        chain = self._chain(var)
        if not chain:
            return self._run([equation], self._values)
        cut = {
            each: equation.primitive.bind(self._values[each], **equation.params)
            for each in self._begin(chain)
        }
        return self._run(chain, cut)

    def _loop(self, equation: core.JaxprEqn) -> Sequence[Any]:
        first, last = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        told = self._read(equation.invars[:first])
        given = equation.invars[first : first + last]
        start = self._read(equation.invars[first + last :])
        unsettled = core.jaxpr_as_fun(equation.params["cond_jaxpr"])
        step = core.jaxpr_as_fun(equation.params["body_jaxpr"])
        chains = [self._chain(var) for var in given]
        weights = _variables([var for chain in chains for var in self._begin(chain)])

        def body(carry: Sequence[Any]) -> Sequence[Any]:
            read = [self._values[var] for var in weights]
            read, carry = jax.lax.optimization_barrier((read, carry))
            fresh = dict(zip(weights, read, strict=True))
            constants = [
                self._run(chain, fresh)[0] if chain else self._read([var])[0]
                for var, chain in zip(given, chains, strict=True)
            ]
            return step(*constants, *carry)

        return jax.lax.while_loop(lambda carry: unsettled(*told, *carry)[0], body, start)

    def _chain(self, var: core.Var | core.Literal) -> _Chain:
        return () if isinstance(var, core.Literal) else self._chains.get(var, ())

    def _begin(self, equations: Sequence[core.JaxprEqn]) -> list[core.Var]:
        """The variables that the equations read and do not make, each once."""
        made = {var for equation in equations for var in equation.outvars}
        read = _variables([var for equation in equations for var in equation.invars])
        return [var for var in read if var not in made]

    def _run(self, equations: Sequence[core.JaxprEqn], values: _Values) -> Sequence[Any]:
        """The results of the last of the equations, which follow one another."""
        begin = self._begin(equations)
        jaxpr = self._jaxpr.replace(
            constvars=(), invars=begin, outvars=equations[-1].outvars, eqns=list(equations)
        )
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*(values[var] for var in begin))

    def _read(self, variables: Sequence[core.Var | core.Literal]) -> list[Any]:
        return [v.val if isinstance(v, core.Literal) else self._values[v] for v in variables]


def _variables(read: Sequence[core.Var | core.Literal]) -> list[core.Var]:
    """Without literals, each once."""
    return list(dict.fromkeys(var for var in read if not isinstance(var, core.Literal)))
