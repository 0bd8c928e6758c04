"""Scoring of programs: merge the models of a setting with each, and answer the task's problems.

With `race` in the config, the programs of an iteration answer growing numbers of the development
problems, and clear losers stop early (see `sdjax.evaluation.racing`). Their score is the accuracy
on the problems that they have answered.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax

from sdjax.core.progress import progress_bar
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.racing import race
from sdjax.evaluation.task import Outcome
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import apply_program, refused_application, trial_of
from sdjax.search.attempts import too_many_attempts
from sdjax.search.context import RunContext, ScoringContext
from sdjax.search.duplicates import compare_with_earlier
from sdjax.search.multihost import try_merge
from sdjax.search.plan import ScoringPlan
from sdjax.search.ranking import ranked_programs
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, SEARCH, Entry, Setting, program_entry

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


def score_programs(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str = SEARCH,
) -> None:
    """Apply the programs of an iteration and score the distinct ones on the development problems.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        iteration: number of the iteration.
        purpose: "search", or the name of a measurement.
    """
    samples = store.judged(iteration, purpose)
    identities = [
        identity
        for sample in samples
        if (identity := sample.identity if sample.novel else sample.unconfirmed) is not None
    ]
    if context.config.race is not None:
        _race(context, store, sandbox, identities, iteration=iteration, purpose=purpose)
        return
    missing = [one for one in identities if not store.is_complete(program_entry(one), DEVELOPMENT)]
    done = len(identities) - len(missing)
    with progress_bar(f"iteration {iteration}: score", len(identities), completed=done) as advance:
        for identity in missing:
            score_program(context, store, sandbox, identity, DEVELOPMENT)
            advance()


def _race(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    identities: Sequence[str],
    *,
    iteration: int,
    purpose: str,
) -> None:
    """Race new programs against each other and against the best earlier ones.

    What an interrupted race has stored is not computed again, and the race takes the same course.
    """
    rules = context.config.race
    assert rules is not None
    rules = dataclasses.replace(rules, winners=max(rules.winners, context.config.test.top_k))
    metric = context.config.task.metric
    problems = racing_order(context.problems[DEVELOPMENT])
    new = set(identities)
    sampled_before = {s.identity for s in store.judged(purpose=purpose) if s.iteration < iteration}
    best = [entry.identity or "" for entry in ranked_programs(store, metric)]
    earlier = [identity for identity in best if identity in sampled_before - new][: rules.winners]
    with progress_bar(f"iteration {iteration}: score", len(identities)) as advance:

        def answer(identity: str, start: int, stop: int) -> list[bool]:
            score_program(context, store, sandbox, identity, DEVELOPMENT, limit=stop)
            outcomes = store.outcomes(program_entry(identity), DEVELOPMENT)
            solved = {outcome.problem_id: getattr(outcome, metric) for outcome in outcomes}
            # A program that is refused, or that duplicates another, has no outcomes.
            return [solved.get(item.problem.id, False) for item in problems[start:stop]]

        def stop(identity: str) -> None:
            if identity in new:
                advance()

        race([*identities, *earlier], answer, len(problems), rules, on_stop=stop)


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
        split: "development" or "test".
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
    with store.attempt(name, setting) as number:
        refusal = too_many_attempts(number)
        if refusal is None and application is None and jax.default_backend() == "cpu":
            refusal = try_merge(sandbox, program.ir, trial_of(context, setting))
        if refusal is None:
            result, merged = apply_program(context, program, setting)
        else:
            result, merged = refused_application(program, setting, refusal), None
        if application is None and result.admitted and split == DEVELOPMENT:
            result = compare_with_earlier(context, store, sandbox, program, result)
    if not store.select(Entry, name=name):
        store.save(Entry(name=name, kind="program", identity=identity))
    if application is None or not result.admitted:
        store.save(result)
    if merged is not None and result.admitted:
        score(context, store, name, merged.params, split, setting, limit=limit)


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
        split: "development" or "test".
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
