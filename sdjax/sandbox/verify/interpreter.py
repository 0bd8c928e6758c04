"""Interpreter of decoded IR: binds one allowed primitive per equation.

Used under `jax.make_jaxpr` to verify a program, under `jax.jit` to run it, and operation by
operation to probe it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax.sandbox.ir.decode import Atom, Block, Equation
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal

# Results, and a boolean array that says whether a `while` loop was cut off at the iteration limit
# (None if there is no `while` loop).
Outputs = tuple[list[Any], Any]
# (equation, operands, max_loop_iterations) -> outputs
Bind = Callable[[Equation, list[Any], int], Outputs]


def bind_equation(equation: Equation, operands: list[Any], max_loop_iterations: int) -> Outputs:
    """Apply one equation to its operands."""
    if equation.name in _CONTROL_FLOW:
        return _CONTROL_FLOW[equation.name](equation, operands, max_loop_iterations)
    bind = ALLOWED[equation.name].bind
    assert bind is not None, equation.name  # `decode` refuses primitives that this JAX lacks
    results = bind(*operands, **equation.params)
    return list(results) if isinstance(results, (list, tuple)) else [results], None


def run_block(
    block: Block, inputs: Sequence[Any], max_loop_iterations: int, bind: Bind = bind_equation
) -> Outputs:
    """Run the equations of a block in order.

    Args:
        block: decoded block.
        inputs: one array per input of the block.
        max_loop_iterations: iterations after which a `while` loop is cut off.
        bind: function that applies one equation.
    """
    values = list(inputs)
    exhausted = jnp.zeros((), bool) if block.loops else None

    def read(atom: Atom) -> Any:
        if type(atom) is int:
            return values[atom]
        # Without the barrier, XLA would compute on constants while compiling, which is slow.
        return lax.optimization_barrier(atom) if isinstance(atom, np.ndarray) else atom

    for equation in block.equations:
        results, flag = bind(equation, [read(a) for a in equation.operands], max_loop_iterations)
        if len(results) != equation.outputs:
            message = f"{equation.name} has {len(results)} results, not {equation.outputs}"
            raise Refusal("refused", "ir", message)
        exhausted = exhausted if flag is None else flag | exhausted
        values.extend(results)
    return [jnp.asarray(read(a)) for a in block.outputs], exhausted


def _scan(equation: Equation, operands: list[Any], max_loop_iterations: int) -> Outputs:
    params = equation.params
    body, num_carry, num_consts = params["body"], params["carry"], params["consts"]
    consts, rest = operands[:num_consts], operands[num_consts:]

    def step(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        state, flag = carry
        outputs, exhausted = run_block(body, [*consts, *state, *xs], max_loop_iterations)
        flag = flag if exhausted is None else flag | exhausted
        return (tuple(outputs[:num_carry]), flag), tuple(outputs[num_carry:])

    flag = jnp.zeros((), bool) if body.loops else None
    initial = (tuple(jnp.asarray(x) for x in rest[:num_carry]), flag)
    xs = tuple(jnp.asarray(x) for x in rest[num_carry:])
    (state, flag), ys = lax.scan(step, initial, xs, params["length"], params["reverse"])
    return [*state, *ys], flag


def _while(equation: Equation, operands: list[Any], max_loop_iterations: int) -> Outputs:
    params = equation.params
    first = params["condition_consts"]
    second = first + params["body_consts"]

    def holds(state: tuple) -> Any:
        inputs = [*operands[:first], *state]
        return run_block(params["condition"], inputs, max_loop_iterations)[0][0]

    # Carry: (state of the loop, iterations left, whether an inner loop was cut off).
    def condition(carry: tuple) -> Any:
        state, remaining, _ = carry
        return jnp.logical_and(holds(state), remaining > 0)

    def step(carry: tuple) -> tuple:
        state, remaining, flag = carry
        inputs = [*operands[first:second], *state]
        outputs, exhausted = run_block(params["body"], inputs, max_loop_iterations)
        return tuple(outputs), remaining - 1, flag if exhausted is None else flag | exhausted

    state = tuple(jnp.asarray(x) for x in operands[second:])
    carry = (state, jnp.int32(max_loop_iterations), jnp.zeros((), bool))
    state, _, flag = lax.while_loop(condition, step, carry)
    return list(state), flag | holds(state)  # if the condition still holds, the loop was cut off


def _cond(equation: Equation, operands: list[Any], max_loop_iterations: int) -> Outputs:
    blocks = equation.params["branches"]
    loops = any(block.loops for block in blocks)

    def branch(block: Block) -> Callable:
        def call(*inputs: Any) -> tuple:
            outputs, exhausted = run_block(block, inputs, max_loop_iterations)
            flag = jnp.zeros((), bool) if exhausted is None else exhausted
            return tuple(outputs), flag if loops else None

        return call

    index, *inputs = (jnp.asarray(x) for x in operands)
    outputs, flag = lax.switch(index, [branch(block) for block in blocks], *inputs)
    return list(outputs), flag


_CONTROL_FLOW: dict[str, Bind] = {"scan": _scan, "while": _while, "cond": _cond}
