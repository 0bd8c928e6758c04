"""Scores of structures: accuracies of the programs of an iteration with tuned constants.

Successive halving over structures and problems at once, by the rules of the race (see
`sdjax.evaluation.racing`). Before each rung, every structure that is still in it tries a few more
numbers (`structure_search.py`), and its best candidate answers twice as many problems. A structure
stops only if it is clearly worse than the worst of the current winners, problem by problem.

A structure that was scored before is not scored again: all its samples share its score, which is
that of the program with its best numbers. This program is one of the run like any other. A program
without numbers to tune takes part as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdjax.core.progress import progress_bar
from sdjax.evaluation.racing import Race, race
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import is_admissible
from sdjax.search.base_identity import base_of_iteration, on_base
from sdjax.search.context import RunContext
from sdjax.search.multihost import SharedJudge
from sdjax.search.phases import judged_program
from sdjax.search.ranking import complete_scores, rank_key
from sdjax.search.run_limits import OutOfTime, never
from sdjax.search.score_types import (
    Application,
    Candidate,
    Evaluation,
    Promotion,
    ScoredStructure,
    StoredOutcome,
)
from sdjax.search.scoring import racing_order, score_program
from sdjax.search.store import Store
from sdjax.search.structure_search import StructureSearches
from sdjax.search.structures import structures_of
from sdjax.search.tune import NOT_TUNED, training_texts
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    SEARCH,
    UNTRAINED,
    Entry,
    Sample,
    StoredVerdict,
    phase_title,
    program_entry,
)


def score_structures(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str,
    out_of_time: Callable[[], bool] = never,
) -> None:
    """Score the structures of an iteration that have no score yet.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        iteration: number of the iteration.
        purpose: "search", that of a control, or the name of a measurement.
        out_of_time: called after each structure has answered; returns whether to stop. The leaders
            of the race then answer the other problems.

    Raises:
        OutOfTime: structures are not scored.
    """
    members = _structures(store, iteration, purpose)
    if not members:
        return
    problems = racing_order(context.problems[DEVELOPMENT])
    rules = context.config.race or Race(first_rung=max(2, len(problems)))
    rules = dataclasses.replace(rules, winners=max(rules.winners, context.config.test.top_k))
    searches = StructureSearches(
        context,
        store,
        SharedJudge(sandbox, context.signature),
        problems=problems,
        rungs=rules.rungs(len(problems)),
        examples=training_texts(context),
    )
    halving = _Halving(context, store, sandbox, searches, iteration=iteration, purpose=purpose)
    halving.run(members, rules, len(problems), out_of_time)


class _Halving:
    """The race of one iteration."""

    def __init__(
        self,
        context: RunContext,
        store: Store,
        sandbox: Sandbox | None,
        searches: StructureSearches,
        *,
        iteration: int,
        purpose: str,
    ) -> None:
        self._context, self._store, self._sandbox = context, store, sandbox
        self._searches, self._iteration, self._purpose = searches, iteration, purpose
        self._judge = SharedJudge(sandbox, context.signature)
        self._written: dict[str, str] = {}  # structure to the program that it is searched from
        self._tuned: set[str] = set()
        self._best: dict[str, Candidate] = {}

    def run(
        self,
        members: Mapping[str, Sequence[str]],
        rules: Race,
        problems: int,
        out_of_time: Callable[[], bool],
    ) -> None:
        """Race the structures against each other and against the best of earlier iterations."""
        rungs = rules.rungs(problems)
        title = phase_title("score", self._iteration, self._purpose)
        with progress_bar(title, len(members)) as advance:
            ended = False
            for structure, identities in members.items():
                if self._written and (ended := out_of_time()):
                    break
                for identity in identities:  # the first one that the real weights admit
                    if self._begin(structure, identity, rungs[0]):
                        self._written[structure] = identity
                        break
                else:
                    advance()
            earlier = self._earlier(rules.winners)

            def answer(name: str, count: int) -> Sequence[bool]:
                if name in earlier:
                    return self._solved(earlier[name], count)
                if name in self._tuned:
                    self._best[name] = self._searches.best(name, rungs.index(count))
                    return self._searches.solved(self._best[name], count)
                self._score(self._written[name], count)
                return self._solved(self._written[name], count)

            def stop(name: str) -> None:
                if name not in earlier:
                    self._finish(name)
                    advance()

            names = [*self._written, *earlier]
            results = race(*(names, answer, problems, rules), on_stop=stop, out_of_time=out_of_time)
        if ended or len(results) < len(names):
            raise OutOfTime

    def _begin(self, structure: str, identity: str, count: int) -> bool:
        """Return whether a structure takes part, searched from a program or with it as it is."""
        scored = self._store.select(ScoredStructure, structure=structure)
        if scored and scored[0].written == identity:
            (entry,) = self._store.select(Entry, name=program_entry(identity))
            if self._searches.candidates(structure) and NOT_TUNED not in entry.detail:
                self._tuned.add(structure)
            return True
        if not self._is_refused(identity) and self._searches.begin(structure, identity):
            self._tuned.add(structure)
            return True
        self._score(identity, count)
        return not self._is_refused(identity)

    def _score(self, identity: str, count: int) -> None:
        score_program(self._context, self._store, self._sandbox, identity, DEVELOPMENT, limit=count)

    def _solved(self, identity: str, count: int) -> list[bool]:
        """Return whether a program solved each of the first problems, which it has answered."""
        metric = self._context.config.task.metric
        outcomes = self._store.outcomes(program_entry(identity), DEVELOPMENT)
        solved = {outcome.problem_id: getattr(outcome, metric) for outcome in outcomes}
        order = racing_order(self._context.problems[DEVELOPMENT])
        return [solved[item.problem.id] for item in order[:count]]

    def _is_refused(self, identity: str) -> bool:
        """Return whether a program is refused on the real weights, or equals an earlier one."""
        found = self._store.select(Application, entry=program_entry(identity), setting=MAIN)
        return bool(found) and not found[0].admitted

    def _earlier(self, count: int) -> dict[str, str]:
        """Return the best programs of the structures of earlier iterations, by entry."""
        records = self._store.select(ScoredStructure)
        earlier = [one for one in records if one.purpose == self._purpose]
        earlier = [one for one in earlier if one.iteration < self._iteration]
        if self._purpose == UNTRAINED:  # as which the first iteration counts
            earlier += [one for one in records if (one.purpose, one.iteration) == (SEARCH, 1)]
        best = {program_entry(one.best): one.best for one in earlier}
        scores = complete_scores(self._store, self._context.config.task.metric)
        complete = [name for name in best if name in scores]
        complete.sort(key=lambda name: rank_key(scores[name], name))
        return {name: best[name] for name in complete[:count]}

    def _finish(self, structure: str) -> None:
        """Save the result of a structure: its best program, with the outcomes of its candidate."""
        identity = self._written[structure]
        if self._store.select(ScoredStructure, structure=structure):
            return
        is_tuned = structure in self._tuned
        best, records = self._tuned_result(identity, structure) if is_tuned else (identity, [])
        self._searches.close(structure)
        result = ScoredStructure(
            structure=structure,
            purpose=self._purpose,
            iteration=self._iteration,
            written=identity,
            best=best,
        )
        self._store.save(*records, result)

    def _tuned_result(self, identity: str, structure: str) -> tuple[str, list[Any]]:
        """Return the identity of the program with the best numbers, and the records to save."""
        first, last = self._searches.candidates(structure)[0], self._best[structure]
        program, number = None, len(last.constants)
        if last.number > 0:
            source = self._searches.write(last)
            verdict = self._judge.judge(source, name=program_entry(identity))
            program = judged_program(self._context, source, verdict)
        if program is None or program.identity == identity:  # no other numbers were better
            return identity, self._records(identity, first, {"constants": number})
        detail = {"tuned_from": identity, "constants": number}
        tuned = self._records(program.identity, last, detail)
        return program.identity, [*self._records(identity, first, {}), program, *tuned]

    def _records(self, identity: str, candidate: Candidate, detail: dict[str, Any]) -> list[Any]:
        """Return a candidate's result as that of a program: its entry, merge and outcomes."""
        name = program_entry(identity)
        entry = Entry(name=name, kind="program", identity=identity, detail=detail)
        if self._store.is_complete(name, DEVELOPMENT):  # another structure has led to it
            return []
        answered = {one.problem_id for one in self._store.outcomes(name, DEVELOPMENT)}
        outcomes = self._searches.outcomes(candidate)
        key = {"entry": name, "setting": MAIN, "split": DEVELOPMENT}
        complete = len(outcomes) == len(self._context.problems[DEVELOPMENT])
        return [
            entry,
            Application(entry=name, setting=MAIN, change=candidate.change),
            Evaluation(**key, complete=complete),
            *(StoredOutcome(**key, outcome=o) for o in outcomes if o.problem_id not in answered),
        ]


def _structures(store: Store, iteration: int, purpose: str) -> dict[str, list[str]]:
    """Return the structures to score in an iteration, each with its programs as sampled.

    A structure that another iteration or purpose has scored is left out. The result is the same
    after an interruption.
    """
    structures, verdicts = structures_of(store), store.by_key(StoredVerdict)
    base = base_of_iteration(store.select(Promotion), purpose, iteration)
    owners = {one.structure: (one.purpose, one.iteration) for one in store.select(ScoredStructure)}
    members: dict[str, list[str]] = {}
    for sample in store.select(Sample, purpose=purpose, iteration=iteration):
        verdict = verdicts.get(sample.source or "")
        if verdict is None or verdict.identity is None or not is_admissible(verdict.verdict):
            continue
        verdict = on_base(verdict, base)
        assert verdict.identity is not None
        structure = structures[verdict.identity]
        if owners.get(structure, (purpose, iteration)) == (purpose, iteration):
            identities = members.setdefault(structure, [])
            if verdict.identity not in identities:
                identities.append(verdict.identity)
    return members
