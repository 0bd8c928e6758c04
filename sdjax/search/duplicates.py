"""Duplicates among the programs of a run, by their merges of the real weights.

Programs with equal results on the probe tensors may be one program written in two ways, or agree
there only, for example because they differ at the depth of a layer that is not probed. Their merges
decide: one more merge computes the difference of the two merged task vectors, without rounding to
the dtype of the weights.
"""

from __future__ import annotations

import dataclasses

import jax

from sdjax.core.errors import UserError
from sdjax.sandbox.algorithm import difference
from sdjax.sandbox.merge_trial import check_estimate
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import DUPLICATE
from sdjax.search.apply_candidate import merge_memory, trial_of
from sdjax.search.context import ScoringContext
from sdjax.search.multihost import try_merge
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import Program, program_entry
from sdjax.sharding.memory import MemoryLimitExceeded

AGREEMENT = 1e-5  # relative distance below which two merges are the same up to rounding

_CANNOT_MERGE = (
    Refusal,
    MemoryLimitExceeded,
    UserError,
    NotImplementedError,
    jax.errors.JaxRuntimeError,
)


def compare_with_earlier(
    context: ScoringContext,
    store: Store,
    sandbox: Sandbox | None,
    program: Program,
    application: Application,
) -> Application:
    """Compare the merge of a program with those of earlier programs that it may equal.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        program: the program.
        application: the result of applying it, "admitted".

    Returns:
        the result, "duplicate" if an earlier program has the same merge.
    """
    if program.fingerprint is None:
        return application
    earlier = store.by_key(Application, setting=application.setting)
    for other in store.select(Program, fingerprint=program.fingerprint):
        applied = earlier.get(program_entry(other.identity))
        if other.identity == program.identity or applied is None or not applied.admitted:
            continue
        tolerance = AGREEMENT * application.change
        # Most programs that agree on the probe tensors only have merges of different norms.
        if abs(applied.change - application.change) > tolerance:
            continue
        distance = _distance(context, sandbox, program, other, application.setting)
        if distance is not None and distance <= tolerance:
            return dataclasses.replace(
                application,
                verdict=DUPLICATE,
                rule="weights",
                message=f"the same merge as {program_entry(other.identity)}",
                original=other.identity,
            )
    return application


def _distance(
    context: ScoringContext, sandbox: Sandbox | None, program: Program, other: Program, setting: str
) -> float | None:
    """Return the norm of the difference of two merges, in the unit of `Application.change`.

    None if it cannot be computed; the programs count as distinct then.
    """
    first, second = context.verified_program(program), context.verified_program(other)
    if first.form != second.form:
        return None
    if jax.default_backend() == "cpu":
        trial = dataclasses.replace(trial_of(context, setting), subtracted=other.ir)
        if try_merge(sandbox, program.ir, trial) is not None:
            return None
    max_memory = first.max_memory + second.max_memory
    try:
        check_estimate(first.memory + second.memory, merge_memory(context, setting))
        merged = context.merge(difference(first, second), setting, max_memory=max_memory)
    except _CANNOT_MERGE:
        return None
    return merged.change if merged.finite else None
