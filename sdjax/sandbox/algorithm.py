"""Adapter from a verified program to a merge algorithm."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import Algorithm
from sdjax.merging.signature import TracedType
from sdjax.sandbox.ir.calling_convention import REQUESTS
from sdjax.sandbox.verify.verified_program import VerifiedProgram


def to_algorithm(program: VerifiedProgram, *, name: str) -> Algorithm:
    """Return the algorithm of a verified program; no source text is executed.

    Its hyperparameters are those of the source that are traced. A PerExpert, which is one scalar
    per expert in the program, is one hyperparameter again.
    """
    values: dict[str, Any] = {}
    traced: dict[str, TracedType] = {}
    for scalar, default in program.hyperparameters.items():
        key, dot, number = scalar.partition(".")
        if dot:
            traced[key] = "per_expert"
            values.setdefault(key, {})[int(number)] = default
        else:
            traced[key], values[key] = "float", default
    for key, type_name in traced.items():
        if type_name == "per_expert":  # in slot order
            values[key] = tuple(value for _, value in sorted(values[key].items()))

    def merge_models(task_vectors: Mapping[str, Any], **inputs: Any) -> Any:
        return program(task_vectors, **scalar_inputs(inputs))

    return Algorithm(
        name=name,
        identity=program.identity,
        form=program.form,
        function=merge_models if "per_expert" in traced.values() else program,
        requests=frozenset(program.requests),
        hyperparameters=values,
        traced=traced,
    )


def scalar_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of an algorithm as a verified program takes them.

    Args:
        inputs: optional inputs and hyperparameters by name; a PerExpert is a dict in slot order.
    """
    scalars: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, Mapping) and key not in REQUESTS:
            scalars |= {f"{key}.{number}": v for number, v in enumerate(value.values(), 1)}
        else:
            scalars[key] = value
    return scalars


def loop_limit_check(program: VerifiedProgram, *, name: str) -> Algorithm:
    """Return an algorithm whose result is 0 if all loops end within the limit, else NaN."""

    def merge(task_vectors: Any, **arguments: Any) -> Any:
        result, exhausted = program.run(task_vectors, **scalar_inputs(arguments))
        if exhausted is None:  # a program may have loops at some shapes only
            return jax.tree.map(jnp.zeros_like, result)
        return jax.tree.map(
            lambda leaf: jnp.where(exhausted, jnp.nan, jnp.zeros_like(leaf)), result
        )

    algorithm = to_algorithm(program, name=name)
    identity = f"loop limit of {algorithm.identity}"
    return dataclasses.replace(algorithm, identity=identity, function=merge)


def difference(program: VerifiedProgram, subtracted: VerifiedProgram) -> Algorithm:
    """Return an algorithm whose result is that of one program minus that of another.

    The hyperparameters of both have their defaults.

    Args:
        program: the first program.
        subtracted: a program of the same form.
    """

    def merge(task_vectors: Any, **inputs: Any) -> Any:
        results = program(task_vectors, **inputs), subtracted(task_vectors, **inputs)
        # Behind the barrier, each result is rounded as in a merge with its program alone.
        return jax.tree.map(jnp.subtract, *jax.lax.optimization_barrier(results))

    return Algorithm(
        name=f"program {program.identity[:12]} minus {subtracted.identity[:12]}",
        identity=f"difference of {program.identity} and {subtracted.identity}",
        form=program.form,
        function=merge,
        requests=frozenset({*program.requests, *subtracted.requests}),
    )
