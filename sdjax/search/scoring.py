"""Scoring of a program: merge the models of a setting with it, and answer the task's problems."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax

from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.task import Outcome
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import apply_program, refused_application, trial_of
from sdjax.search.attempts import too_many_attempts
from sdjax.search.bases import context_on_base
from sdjax.search.context import ScoringContext
from sdjax.search.duplicates import compare_with_earlier
from sdjax.search.multihost import try_merge
from sdjax.search.plan import ScoringPlan
from sdjax.search.score_types import Application, ScoredStructure
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, Entry, Setting, program_entry

_OUTCOMES_PER_COMMIT = 64


def save_settings(plan: ScoringPlan, store: Store) -> None:
    """Save the models of each setting, which scores refer to."""
    config = plan.config
    saved = store.by_key(Setting)
    for name, experts in plan.settings.items():
        if name not in saved:
            store.save_setting(
                Setting(
                    name=name,
                    seed=config.seed,
                    slots={slot: experts[slot].model for slot in config.slots},
                    scope=str(config.scope),
                    task=config.task.name,
                )
            )


def racing_order(problems: Sequence[PromptedProblem]) -> list[PromptedProblem]:
    """Return the problems in a fixed random order, the same in every run and on every process."""

    def digest(item: PromptedProblem) -> bytes:
        return hashlib.sha256(item.problem.id.encode()).digest()

    return sorted(problems, key=digest)


def score_program(
    context: ScoringContext,
    store: Store,
    sandbox: Sandbox | None,
    identity: str,
    split: str,
    setting: str = MAIN,
    *,
    limit: int | None = None,
) -> None:
    """Apply a verified program to the models of a setting and score the merged model.

    On the development problems, a program whose merge equals that of an earlier one is not scored.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process, which tries the merge first; None on the others.
        identity: identity of the program.
        split: "development", "confirmation" or "test".
        setting: name of the setting.
        limit: answer only the first problems in `racing_order`; all by default.
    """
    name = program_entry(identity)
    application = store.by_key(Application, setting=setting).get(name)
    if application is not None and not application.admitted:
        return
    if _is_answered(context, store, name, split, setting, limit):
        return
    program = store.program(identity)
    try:
        context = context_on_base(context, store, program.base, setting, sandbox=sandbox)
    except Refusal as refusal_of_base:
        _save_entry(store, identity)
        store.save(refused_application(program, setting, refusal_of_base))
        return
    with store.attempt(name, setting) as number:
        refusal = too_many_attempts(number)
        tried = application is not None and not _is_from_candidate(store, identity)
        if refusal is None and not tried and jax.default_backend() == "cpu":
            refusal = try_merge(sandbox, program.ir, trial_of(context, setting))
        if refusal is None:
            result, merged = apply_program(context, program, setting)
        else:
            result, merged = refused_application(program, setting, refusal), None
        if application is None and result.admitted and split == DEVELOPMENT:
            result = compare_with_earlier(context, store, sandbox, program, result)
    _save_entry(store, identity)
    if application is None or not result.admitted:
        store.save(result)
    if merged is not None and result.admitted:
        score(context, store, name, merged.params, split, setting, limit=limit)


def _save_entry(store: Store, identity: str) -> None:
    name = program_entry(identity)
    if not store.select(Entry, name=name):
        store.save(Entry(name=name, kind="program", identity=identity))


def _is_from_candidate(store: Store, identity: str) -> bool:
    """Return whether only a program's parametric form may have been merged so far."""
    return any(store.select(ScoredStructure, **{side: identity}) for side in ("written", "best"))


def score(
    context: ScoringContext,
    store: Store,
    entry: str,
    params: dict[str, Any],
    split: str,
    setting: str = MAIN,
    *,
    limit: int | None = None,
) -> None:
    """Decode and grade the problems of a split that do not have an outcome for this entry.

    Args:
        context: the loaded run.
        store: the run's store.
        entry: name of a saved entry.
        params: parameters of the entry's model.
        split: "development", "confirmation" or "test".
        setting: name of the setting in which the entry was applied.
        limit: answer only the first problems in `racing_order`; all by default.
    """
    if _is_answered(context, store, entry, split, setting, limit):
        return
    problems = _unanswered(context, store, entry, split, setting, limit)
    unsaved: list[Outcome] = []

    def save(outcome: Outcome) -> None:
        unsaved.append(outcome)
        if len(unsaved) == _OUTCOMES_PER_COMMIT:
            store.save_scores(entry, split, unsaved, complete=False, setting=setting)
            unsaved.clear()

    evaluate_problems(
        context.eval_decoder, context.tokenizer, params, context.task, problems, on_outcome=save
    )
    complete = limit is None or limit >= len(context.problems[split])
    store.save_scores(entry, split, unsaved, complete=complete, setting=setting)


def _is_answered(
    context: ScoringContext, store: Store, entry: str, split: str, setting: str, limit: int | None
) -> bool:
    """Return whether an entry has answered the first `limit` problems, or is complete."""
    if store.is_complete(entry, split, setting):
        return True
    # Without a limit, an evaluation whose outcomes are all there may still have to be completed.
    if limit is None or limit >= len(context.problems[split]):
        return False
    return not _unanswered(context, store, entry, split, setting, limit)


def _unanswered(
    context: ScoringContext, store: Store, entry: str, split: str, setting: str, limit: int | None
) -> list[PromptedProblem]:
    """Return the problems without an outcome, among the first `limit` in `racing_order`."""
    problems = context.problems[split]
    if limit is not None:
        problems = racing_order(problems)[:limit]
    done = {outcome.problem_id for outcome in store.outcomes(entry, split, setting)}
    return [item for item in problems if item.problem.id not in done]
