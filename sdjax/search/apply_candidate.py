"""A verified program on real weights: the model that it makes, or why it is refused after all.

The probe tensors are small and few; what only the model's own weights bring to light ends in a
verdict in the sandbox's words: non-finite, or too costly by fuel or memory of what was compiled.
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
from sdjax.merging.engine import MergedModel
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import VerifiedProgram, verify_ir
from sdjax.search.context import RunContext
from sdjax.search.types import Application, program_candidate


def apply_program(
    bench: RunContext, identity: str, ir: str, setting: str
) -> tuple[Application, MergedModel | None]:
    """What to keep of it, and the merged model where the program stays admitted."""
    name = program_candidate(identity)
    program = verify_ir(ir, bench.signature)
    algorithm = to_algorithm(program, name=name)
    start = time.monotonic()
    merged, refusal = None, None
    try:
        merged = bench.merge(algorithm, setting, max_memory=program.max_memory)
        if not merged.finite:
            refusal = _why_not_finite(bench, algorithm, program, setting)
    except MemoryLimitExceeded:
        message = "compiled for the model, the program takes more memory than it may"
        refusal = Refusal("too costly", "memory", message)
    # Tracing, lowering and XLA may object to shapes and devices that were not probed; any other
    # exception is a bug of ours and no verdict.
    except (UserError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        message = f"the array program cannot be run on the model ({type(error).__name__})"
        refusal = Refusal("refused", "ir", message)
    application = Application(
        candidate=name,
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
    bench: RunContext, algorithm: Algorithm, program: VerifiedProgram, setting: str
) -> Refusal:
    """A loop that used up its fuel makes the result NaN as well; which it was is asked apart."""
    if any(block.loops for _, block in program.programs.values()):
        identity = f"fuel of {algorithm.identity}"
        ended = dataclasses.replace(algorithm, identity=identity, function=_exhaustion(program))
        if not bench.merge(ended, setting).finite:
            limit = program.max_loop_iterations
            message = f"a `while` loop did not end within {limit} iterations on the model"
            return Refusal("too costly", "loop-iterations", message)
    message = "the merged weights hold NaN or infinite values; guard divisions, logarithms, roots"
    return Refusal("non-finite", "weights", message)


def _exhaustion(program: VerifiedProgram) -> Any:
    """An algorithm's function: zero where all loops of the program end, else NaN."""

    def call(task_vectors: Any, **asked: Any) -> Any:
        result, exhausted = program.run(task_vectors, **asked)
        return jax.tree.map(
            lambda leaf: jnp.where(exhausted, jnp.nan, jnp.zeros_like(leaf)), result
        )

    return call
