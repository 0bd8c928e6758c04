"""Application of a verified program to real weights.

The sandbox probes a program with a few small tensors. Failures that only occur on the model's
weights become one of the sandbox's verdicts: "non-finite", or "too costly" because of loop
iterations or of the memory of the compiled merge.

The merge is first tried in a confined process (`trial_of`). What kills this process nevertheless is
known from the store (`attempts.py`).
"""

from __future__ import annotations

import time

import jax

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import Merger
from sdjax.merging.merged_model import MergedModel
from sdjax.sandbox.algorithm import loop_limit_check, to_algorithm
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor, check_estimate
from sdjax.sandbox.refusal import NON_FINITE, Refusal
from sdjax.sandbox.verify.verified_program import VerifiedProgram
from sdjax.search.context import ScoringContext
from sdjax.search.score_types import Application
from sdjax.search.types import Program, program_entry
from sdjax.sharding.memory import MemoryLimitExceeded, memory_of


def apply_program(
    context: ScoringContext, program: Program, setting: str
) -> tuple[Application, MergedModel | None]:
    """Merge the models of a setting with a program.

    Returns:
        the result to store, and the merged model if the program is still admitted, else None.
    """
    verified = context.verified_program(program)
    algorithm = to_algorithm(verified, name=program_entry(program.identity))
    start = time.monotonic()
    merged, refusal = None, None
    try:
        check_estimate(verified.memory, merge_memory(context, setting))
        merged = context.merge(algorithm, setting, max_memory=verified.max_memory)
        if not merged.finite:
            refusal = _why_not_finite(context, algorithm, verified, setting)
    except Refusal as error:
        refusal = error
    except MemoryLimitExceeded as error:
        refusal = Refusal("too costly", "memory", str(error))
    # JAX may reject shapes and devices that were not probed; any other exception is a bug in sdjax.
    except (UserError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        message = f"the array program fails on the model ({type(error).__name__})"
        refusal = Refusal("refused", "ir", message)
    change, seconds = 0.0 if merged is None else merged.change, time.monotonic() - start
    if refusal is not None:
        return refused_application(program, setting, refusal, change=change, seconds=seconds), None
    entry = program_entry(program.identity)
    return Application(entry=entry, setting=setting, change=change, seconds=seconds), merged


def refused_application(
    program: Program,
    setting: str,
    refusal: Refusal,
    *,
    change: float = 0.0,
    seconds: float = 0.0,
) -> Application:
    """Return the result of a merge that was refused."""
    return Application(
        entry=program_entry(program.identity),
        setting=setting,
        verdict=refusal.verdict,
        rule=refusal.rule,
        message=refusal.message,
        change=change,
        seconds=seconds,
    )


def trial_of(context: ScoringContext, setting: str) -> MergeTrial:
    """Return what `apply_program` compiles, for `Sandbox.try_merge`."""
    return trial_of_merger(context.mergers[setting])


def trial_of_merger(merger: Merger) -> MergeTrial:
    """Return what a merger compiles for a program, for `Sandbox.try_merge`."""
    tensors = tuple(
        TrialTensor(
            path=path,
            shape=experts[0].shape,
            base=None if base is None else base.dtype.name,
            experts=tuple(expert.dtype.name for expert in experts),
            changed=path in merger.changed,
        )
        for path, (base, experts) in merger.tensors.items()
    )
    return MergeTrial(
        memory=_memory_of_merger(merger),
        tensors=tensors,
        compiler="quick" if merger.compile_cache.quick else "full",
    )


def merge_memory(context: ScoringContext, setting: str) -> int:
    """Return the bytes that the devices of a setting's models have together."""
    return _memory_of_merger(context.mergers[setting])


def _memory_of_merger(merger: Merger) -> int:
    _, experts = next(iter(merger.tensors.values()))
    return memory_of(experts[0].sharding.device_set)


def _why_not_finite(
    context: ScoringContext, algorithm: Algorithm, verified: VerifiedProgram, setting: str
) -> Refusal:
    """Return the reason for NaNs, which also mark a loop that hit its iteration limit."""
    if any(block.loops for _, block in verified.programs.values()):
        check = loop_limit_check(verified, name=algorithm.name)
        if not context.merge(check, setting).finite:
            limit = verified.max_loop_iterations
            message = f"a `while` loop did not finish within {limit} iterations on the model"
            return Refusal("too costly", "loop-iterations", message)
    message = (
        "the merged weights contain NaN or infinite values; guard divisions, logarithms and roots"
    )
    return Refusal(NON_FINITE, "weights", message)
