"""Ablations of the finalists, which measure each part of a program on confirmation problems.

The merged task vector is scaled, so that a better scale is not mistaken for a better direction.
Each constant that could be tuned becomes 0, which removes a term or a weight; one that must not be
0, as a divisor, becomes 1. Each expert is left out (its task vector is zero), each pair of experts
is swapped, and the tensors in scope are changed from those of the MLPs to all of them, or back.

An ablation is an entry of its own kind, which is neither ranked nor tested. Ablations are saved
before they are computed, so that an interrupted run resumes with those that lack a score.
`sdjax.search.ablation_merges` computes the merges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from sdjax.core.progress import progress_bar
from sdjax.sandbox.refusal import NON_FINITE
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.ablation_merges import AblationMerges, MergeFailure
from sdjax.search.attempts import too_many_attempts
from sdjax.search.context import RunContext
from sdjax.search.ranking import final_ranking, set_aside
from sdjax.search.score_types import Application
from sdjax.search.scoring import score
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, MAIN, Entry
from sdjax.tuning.types import Parameter

SCALES = (0.5, 0.8, 1.25, 2.0)
SCOPES = ("mlp", "all")
ABLATION = "ablation"


def ablate(context: RunContext, store: Store, sandbox: Sandbox | None) -> None:
    """Score the ablations of the best confirmed programs, if there are confirmation problems.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
    """
    if CONFIRMATION not in context.problems:
        return
    finalists = _finalists(context, store)
    with AblationMerges(context, store, sandbox) as merges:
        for program in finalists:
            if not ablations_of(store, program.name):
                store.save(*_plan(context, merges, program))
        ablations = [one for program in finalists for one in ablations_of(store, program.name)]
        missing = [entry for entry in ablations if not is_settled(store, entry.name)]
        done = len(ablations) - len(missing)
        with progress_bar("ablate", len(ablations), completed=done) as advance:
            for entry in missing:
                _score_ablation(context, store, merges, entry)
                advance()


def ablations_of(store: Store, program: str) -> list[Entry]:
    """Return the ablations of a program, by name of its entry, in the order of this module."""
    entries = store.select(Entry, kind=ABLATION)
    return [entry for entry in entries if entry.detail.get("program") == program]


def is_settled(store: Store, name: str) -> bool:
    """Return whether an ablation has its score, or cannot have one since its merge was refused."""
    application = store.by_key(Application, setting=MAIN).get(name)
    refused = application is not None and not application.admitted
    return refused or store.is_complete(name, CONFIRMATION)


def neutral_value(parameter: Parameter) -> float:
    """Return the value that removes a constant: 0, or 1 with its sign if it must not become 0."""
    return 0.0 if parameter.low <= 0 <= parameter.high else math.copysign(1.0, parameter.start)


def _finalists(context: RunContext, store: Store) -> list[Entry]:
    config = context.config
    others = set_aside(store)
    confirmed = [
        program
        for program in final_ranking(store, config.task.metric)
        if program.name not in others and store.is_complete(program.name, CONFIRMATION)
    ]
    return confirmed[: config.test.ablations]


def _plan(context: RunContext, merges: AblationMerges, program: Entry) -> Iterator[Entry]:
    """Yield the ablations of a program, without their scores."""

    def ablation(title: str, **change: Any) -> Entry:
        detail = {"program": program.name, **change}
        name = f"{ABLATION}:{program.identity}:{title}"
        return Entry(name=name, kind=ABLATION, detail=detail)

    for scale in SCALES:
        yield ablation(f"scaled by {scale:g}", scale=scale)
    for parameter in merges.parameters(program):
        value = neutral_value(parameter)
        if value == parameter.start:
            continue
        title = f"{parameter.name} = {value:g} instead of {parameter.start:g}"
        yield ablation(title, constant=parameter.name, value=value)
    slots = context.config.slots
    if len(slots) > 1:
        for slot in slots:
            yield ablation(f"without {slot}", expert=slot)
    for first, second in itertools.combinations(slots, 2):
        yield ablation(f"{first} and {second} swapped", swapped=[first, second])
    for scope in SCOPES:
        if scope != context.config.scope:
            title = "all tensors merged" if scope == "all" else f"only {scope} tensors merged"
            yield ablation(title, scope=scope)


def _score_ablation(
    context: RunContext, store: Store, merges: AblationMerges, entry: Entry
) -> None:
    name, change, finite = entry.name, 0.0, True
    verdict, rule, message = "admitted", "", ""
    merged = None
    with store.attempt(name, MAIN) as number:
        if refusal := too_many_attempts(number):
            verdict, rule, message = refusal.verdict, refusal.rule, refusal.message
        else:
            try:
                merged = merges.merge(entry)
                change, finite = merged.change, merged.finite
            except MergeFailure as failure:
                verdict, rule, message = "refused", "ablation", str(failure)
    if not finite:
        verdict, rule, message = NON_FINITE, "weights", "the merged weights are not finite"
    store.save(Application(entry=name, verdict=verdict, rule=rule, message=message, change=change))
    if merged is not None and finite:
        score(context, store, name, merged.params, CONFIRMATION)
