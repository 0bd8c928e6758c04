"""Application of a verified program to real weights.

The sandbox probes a program with a few small tensors. Failures that only occur on the model's
weights become one of the sandbox's verdicts: "non-finite", or "too costly" because of loop
iterations or of the memory of the compiled merge.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import MemoryLimitExceeded
from sdjax.merging.merged_model import MergedModel
from sdjax.sandbox.algorithm import scalar_inputs, to_algorithm
from sdjax.sandbox.refusal import NON_FINITE, Refusal
from sdjax.sandbox.verify.verified_program import VerifiedProgram
from sdjax.search.context import RunContext
from sdjax.search.types import Application, Program, program_entry


def apply_program(
    context: RunContext, program: Program, setting: str
) -> tuple[Application, MergedModel | None]:
    """Merge the models of a setting with a program.

    Returns:
        the result to store, and the merged model if the program is still admitted, else None.
    """
    name = program_entry(program.identity)
    verified = context.verified_program(program)
    algorithm = to_algorithm(verified, name=name)
    start = time.monotonic()
    merged, refusal = None, None
    try:
        merged = context.merge(algorithm, setting, max_memory=verified.max_memory)
        if not merged.finite:
            refusal = _why_not_finite(context, algorithm, verified, setting)
    except MemoryLimitExceeded:
        message = "the compiled merge exceeds the memory limit"
        refusal = Refusal("too costly", "memory", message)
    # JAX may reject shapes and devices that were not probed; any other exception is a bug in sdjax.
    except (UserError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        message = f"the array program fails on the model ({type(error).__name__})"
        refusal = Refusal("refused", "ir", message)
    application = Application(
        entry=name,
        setting=setting,
        change=0.0 if merged is None else merged.change,
        seconds=time.monotonic() - start,
    )
    if refusal is None:
        return application, merged
    refused = dataclasses.replace(
        application, verdict=refusal.verdict, rule=refusal.rule, message=refusal.message
    )
    return refused, None


def _why_not_finite(
    context: RunContext, algorithm: Algorithm, verified: VerifiedProgram, setting: str
) -> Refusal:
    """Return the reason for NaNs, which also mark a loop that hit its iteration limit."""
    if any(block.loops for _, block in verified.programs.values()):
        check = dataclasses.replace(
            algorithm,
            identity=f"loop limit of {algorithm.identity}",
            function=_loop_limit_check(verified),
        )
        if not context.merge(check, setting).finite:
            limit = verified.max_loop_iterations
            message = f"a `while` loop did not finish within {limit} iterations on the model"
            return Refusal("too costly", "loop-iterations", message)
    message = (
        "the merged weights contain NaN or infinite values; guard divisions, logarithms and roots"
    )
    return Refusal(NON_FINITE, "weights", message)


def _loop_limit_check(verified: VerifiedProgram) -> Any:
    """Return a merge function that returns 0 if all loops finish within the limit, else NaN."""

    def merge_models(task_vectors: Any, **arguments: Any) -> Any:
        result, exhausted = verified.run(task_vectors, **scalar_inputs(arguments))
        return jax.tree.map(
            lambda leaf: jnp.where(exhausted, jnp.nan, jnp.zeros_like(leaf)), result
        )

    return merge_models
