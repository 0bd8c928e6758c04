"""Scores of the programs of an iteration on the development problems.

With `score: tuned` in the config, structures are scored (see `structure_scores.py`). Otherwise
programs are, as they were written: with `race`, they answer growing numbers of the problems, and
clear losers stop early (see `sdjax.evaluation.racing`). Their score is the accuracy on the problems
that they have answered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sdjax.core.progress import progress_bar
from sdjax.evaluation.racing import race
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.base_identity import base_of_iteration
from sdjax.search.bases import context_on_base
from sdjax.search.context import RunContext
from sdjax.search.ranking import first_samples, ranked_programs
from sdjax.search.run_limits import OutOfTime, end_if, never
from sdjax.search.score_types import Promotion
from sdjax.search.scoring import racing_order, score_program
from sdjax.search.store import Store
from sdjax.search.structure_scores import score_structures
from sdjax.search.types import DEVELOPMENT, SEARCH, UNTRAINED, phase_title, program_entry


def score_programs(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str = SEARCH,
    out_of_time: Callable[[], bool] = never,
) -> None:
    """Score the distinct programs, or structures, of an iteration on the development problems.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        iteration: number of the iteration.
        purpose: "search", that of a control, or the name of a measurement. Programs that the search
            has sampled keep the outcomes that they have.
        out_of_time: called after each program has answered; returns whether to stop. The leaders of
            a race then answer the other problems.

    Raises:
        OutOfTime: programs are not scored.
    """
    base = base_of_iteration(store.select(Promotion), purpose, iteration)
    context = context_on_base(context, store, base, sandbox=sandbox)
    if context.config.score == "tuned":
        score_structures(
            *(context, store, sandbox),
            iteration=iteration,
            purpose=purpose,
            out_of_time=out_of_time,
        )
        return
    samples = store.judged(iteration, purpose)
    identities = [
        identity
        for sample in samples
        if (identity := sample.identity if sample.novel else sample.unconfirmed) is not None
    ]
    if purpose != SEARCH:
        found = {sample.identity for sample in store.judged()}
        identities = [identity for identity in identities if identity not in found]
    if context.config.race is not None:
        _race(
            *(context, store, sandbox, identities),
            iteration=iteration,
            purpose=purpose,
            out_of_time=out_of_time,
        )
        return
    missing = [one for one in identities if not store.is_complete(program_entry(one), DEVELOPMENT)]
    done = len(identities) - len(missing)
    with progress_bar(
        phase_title("score", iteration, purpose), len(identities), completed=done
    ) as advance:
        for number, identity in enumerate(missing):
            if number > 0:
                end_if(out_of_time)
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
    out_of_time: Callable[[], bool],
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
    if purpose == UNTRAINED:  # as which the first iteration counts
        sampled_before |= {sample.identity for sample in first_samples(store)}
    best = [entry.identity or "" for entry in ranked_programs(store, metric, purpose)]
    earlier = [identity for identity in best if identity in sampled_before - new][: rules.winners]
    with progress_bar(phase_title("score", iteration, purpose), len(identities)) as advance:

        def answer(identity: str, count: int) -> list[bool]:
            score_program(context, store, sandbox, identity, DEVELOPMENT, limit=count)
            outcomes = store.outcomes(program_entry(identity), DEVELOPMENT)
            solved = {outcome.problem_id: getattr(outcome, metric) for outcome in outcomes}
            # A program that is refused, or that duplicates another, has no outcomes.
            return [solved.get(item.problem.id, False) for item in problems[:count]]

        def stop(identity: str) -> None:
            if identity in new:
                advance()

        names = [*identities, *earlier]
        results = race(
            *(names, answer, len(problems), rules), on_stop=stop, out_of_time=out_of_time
        )
    if len(results) < len(names):
        raise OutOfTime
