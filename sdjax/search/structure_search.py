"""Search of the numbers of one structure while it is scored: candidates, and what they answered.

The first candidate has the numbers of the program as it was written. Before each rung of the race,
numbers with a gradient move from the best candidate by a few steps on training problems, for which
nothing is decoded, and candidates are sampled around it for the numbers without one. All of them
answer the problems of the rung, and the best one is what the structure has reached.

Every candidate is stored before it answers, and every answer as soon as it is there, so that an
interrupted search takes the same course.

Axes: parameters.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.task import Outcome
from sdjax.merging.merged_model import MergedModel
from sdjax.search.apply_candidate import trial_of
from sdjax.search.attempts import too_many_attempts
from sdjax.search.context import RunContext
from sdjax.search.multihost import SharedJudge
from sdjax.search.score_types import Candidate, CandidateOutcome
from sdjax.search.store import Store
from sdjax.search.tune import NOT_TUNED, TUNING_FOLDER, compile_gradient, differentiable_loss
from sdjax.search.types import MAIN, Entry, program_entry
from sdjax.training.packing import Example
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.loss import MergeLoss
from sdjax.tuning.programs import program_tunable
from sdjax.tuning.search import Box, Evaluations, SearchConfig
from sdjax.tuning.trace import Trace
from sdjax.tuning.types import Tunable

_OUTCOMES_PER_COMMIT = 64

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Numbers:
    """The numbers of a structure, and how they are searched.

    Attributes:
        tunable: the numbers and the merge, starting from the program as it was written.
        loss: the loss on training problems; None if nothing is searched by gradient.
        sampled: indices of the numbers that candidates sample, since they have no gradient.
    """

    tunable: Tunable
    loss: MergeLoss | None
    sampled: tuple[int, ...]


class StructureSearches:
    """The searches of the structures of a run, which share its models and its training problems."""

    def __init__(
        self,
        context: RunContext,
        store: Store,
        judge: SharedJudge,
        *,
        problems: Sequence[PromptedProblem],
        rungs: Sequence[int],
        examples: Sequence[Example],
    ) -> None:
        """Prepare the searches.

        Args:
            context: the loaded run.
            store: the run's store.
            judge: judges the parametric forms.
            problems: the development problems in the order of the race.
            rungs: how many of them have been answered after each rung.
            examples: the task's training problems; empty if it has none.
        """
        assert context.config.tuning is not None
        self._context, self._store, self._judge = context, store, judge
        self._problems, self._rungs, self._examples = problems, rungs, examples
        self._config = context.config.tuning
        by_gradient = self._config.search.optimizer != "cmaes" and self._config.structures.steps > 0
        self._with_gradient = by_gradient and bool(examples)
        self._numbers: dict[str, Numbers] = {}
        self._best: dict[str, tuple[int, int]] = {}
        self._last: MergedModel | None = None

    def begin(self, structure: str, identity: str) -> bool:
        """Open the search of a structure; return False if there is nothing to search.

        Args:
            structure: hash of the structure.
            identity: identity of the program that the search starts from.
        """
        numbers = self._open(identity)
        if numbers is None:
            return False
        if not self.candidates(structure):
            self._try(structure, numbers, numbers.tunable.start, origin="written")
        self._numbers[structure] = numbers
        return True

    def close(self, structure: str) -> None:
        """Free what the search of a structure keeps in memory."""
        self._numbers.pop(structure, None)

    def best(self, structure: str, rung: int) -> Candidate:
        """Return the best candidate of a structure after a rung; compute what the store lacks.

        Args:
            structure: hash of a structure whose search has begun, or is finished.
            rung: index of the rung; the earlier ones have been computed.
        """
        known = self._best.get(structure)
        if known is None or known[0] < rung:
            assert rung == (0 if known is None else known[0] + 1)
            number = self._advance(structure, 0 if known is None else known[1], rung)
            self._best[structure] = known = rung, number
        return self.candidates(structure)[known[1]]

    def candidates(self, structure: str) -> dict[int, Candidate]:
        """Return the candidates of a structure by number."""
        found = self._store.select(Candidate, structure=structure)
        return {candidate.number: candidate for candidate in found}

    def solved(self, candidate: Candidate, count: int) -> list[bool]:
        """Return whether a candidate solved each of the first `count` problems.

        If the merged weights are not finite, all count as wrong.
        """
        metric = self._context.config.task.metric
        answers = {one.problem_id: getattr(one, metric) for one in self.outcomes(candidate)}
        return [answers.get(item.problem.id, False) for item in self._problems[:count]]

    def outcomes(self, candidate: Candidate) -> list[Outcome]:
        """Return the outcomes of a candidate, sorted by problem id."""
        key = {"structure": candidate.structure, "number": candidate.number}
        return [one.outcome for one in self._store.select(CandidateOutcome, **key)]

    def write(self, candidate: Candidate) -> str:
        """Return the program of a candidate."""
        return self._numbers[candidate.structure].tunable.write(_values(candidate))

    def _advance(self, structure: str, best: int, rung: int) -> int:
        """Have the best candidate and the new ones answer a rung; return the best one's number."""
        count = self._rungs[rung]
        numbers = self._numbers.get(structure)
        if numbers is None:  # the search is finished, so that the store has everything
            new = [one for one in self.candidates(structure).values() if one.rung == rung]
        else:
            self._answer(numbers, self.candidates(structure)[best], count)
            new = []
            for candidate, merged in self._new_candidates(structure, numbers, best, rung):
                self._answer(numbers, candidate, count, merged)
                new.append(candidate)
        # The later one of equals: what the training problems prefer.
        scores = {one.number: sum(self.solved(one, count)) for one in new}
        scores[best] = sum(self.solved(self.candidates(structure)[best], count))
        return max(scores, key=lambda number: (scores[number], number))

    def _new_candidates(
        self, structure: str, numbers: Numbers, best: int, rung: int
    ) -> Iterator[tuple[Candidate, MergedModel | None]]:
        """Yield the candidates of a rung, and their merges if they were not stored."""
        stored, settings = self.candidates(structure), self._config.structures
        if settings.rungs is not None and rung >= settings.rungs:
            return
        number = sum(one.rung < rung for one in stored.values()) + (rung == 0)
        center = _values(stored[best])
        if numbers.loss is not None:
            if number in stored:
                candidate, merged = stored[number], None
            else:
                values, steps = self._descend(numbers, center, rung)
                candidate, merged = self._try(
                    *(structure, numbers, values), origin="gradient", rung=rung, steps=steps
                )
            yield candidate, merged
            center, number = _values(candidate), number + 1
        if not numbers.sampled:
            return
        box = Box(numbers.tunable)
        for index in range(number, number + settings.candidates):
            if index in stored:
                yield stored[index], None
                continue
            seed = [self._context.config.rng_seed, int(structure[:8], 16), index]
            scaled = box.scaled(center)
            noise = np.random.default_rng(seed).normal(size=len(numbers.sampled))
            scaled[list(numbers.sampled)] += self._config.search.sigma * 0.5**rung * noise
            values = box.values(scaled)
            yield self._try(structure, numbers, values, origin="sampled", rung=rung)

    def _descend(self, numbers: Numbers, start: np.ndarray, rung: int) -> tuple[np.ndarray, int]:
        """Return the values after the gradient steps of a rung, and how many steps were made."""
        loss = numbers.loss
        assert loss is not None
        parameters = zip(numbers.tunable.parameters, start.tolist(), strict=True)
        tunable = dataclasses.replace(
            numbers.tunable,
            parameters=tuple(dataclasses.replace(one, start=value) for one, value in parameters),
        )
        trace = Trace()
        # One evaluation is that of the last values, which is left to the race.
        evaluations = Evaluations(lambda values: {"score": 0.0}, 1, trace)
        search_by_gradient(
            *(tunable, lambda values, _, step: loss(values, rung, step), evaluations),
            *(self._gradient_config(rungs=1), trace),
        )
        assert evaluations.best is not None
        steps = sum(event.get("gradient") is not None for event in trace.events)
        return np.array(evaluations.best["values"]), steps

    def _gradient_config(self, *, rungs: int) -> SearchConfig:
        settings = self._config.structures
        return SearchConfig(
            budget=rungs,
            starts=rungs,  # so that each rung has its own batches
            seed=self._config.search.seed,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            batch=settings.batch,
        )

    def _open(self, identity: str) -> Numbers | None:
        """Return the numbers of a program; None if it takes part as it is."""
        context, store, name = self._context, self._store, program_entry(identity)
        entries = store.select(Entry, name=name)
        entry = entries[0] if entries else Entry(name=name, kind="program", identity=identity)
        if NOT_TUNED in entry.detail:
            return None
        title = f"program {identity[:8]}"
        trial = trial_of(context, MAIN) if jax.default_backend() == "cpu" else None
        try:
            source = store.program(identity).source
            tunable = program_tunable(
                source,
                self._judge,
                name=title,
                trial=trial,
                with_gradient=self._with_gradient,
            )
            if not entries:
                store.save(entry)
            with store.attempt(name, TUNING_FOLDER) as attempt:
                if refusal := too_many_attempts(attempt):
                    detail = {**entry.detail, NOT_TUNED: refusal.message}
                    store.save(dataclasses.replace(entry, detail=detail))
                    raise UserError(f"{title}: {refusal.message}")
                loss, sampled = self._loss(tunable)
                if not self._merge(tunable, tunable.start).finite:
                    raise UserError(f"{title}: the merged weights are not finite")
                loss = compile_gradient(tunable, loss)
        except UserError as error:
            logger.debug("scored as written: %s", error)
            return None
        except jax.errors.JaxRuntimeError as error:
            logger.debug("scored as written: %s: %s", title, type(error).__name__)
            return None
        if loss is None:
            sampled = tuple(range(len(tunable.parameters)))
        return Numbers(tunable=tunable, loss=loss, sampled=sampled)

    def _loss(self, tunable: Tunable) -> tuple[MergeLoss | None, tuple[int, ...]]:
        """Return the loss, if any number has a gradient, and the numbers without one."""
        every = tuple(range(len(tunable.parameters)))
        if not self._with_gradient:
            return None, every
        config = self._gradient_config(rungs=len(self._rungs))
        loss = differentiable_loss(self._context, tunable, self._examples, config, partly=True)
        return loss, every if loss is None else tuple(sorted(loss.blocking()))

    def _try(
        self,
        structure: str,
        numbers: Numbers,
        values: np.ndarray,
        *,
        origin: str,
        rung: int = 0,
        steps: int = 0,
    ) -> tuple[Candidate, MergedModel]:
        """Merge with some values, and save the candidate under the next number."""
        merged = self._merge(numbers.tunable, values)
        names = [parameter.name for parameter in numbers.tunable.parameters]
        candidate = Candidate(
            structure=structure,
            number=len(self.candidates(structure)),
            rung=rung,
            origin=origin,
            constants=dict(zip(names, values.tolist(), strict=True)),
            steps=steps,
            change=merged.change,
            finite=bool(merged.finite),
        )
        self._store.save(candidate)
        return candidate, merged

    def _merge(self, tunable: Tunable, values: np.ndarray) -> MergedModel:
        algorithm, key = tunable.bind(values), self._context.key("merge")
        merger = self._context.mergers[MAIN]
        self._last = merged = merger(algorithm, key=key, donate=self._last)
        return merged

    def _answer(
        self,
        numbers: Numbers,
        candidate: Candidate,
        count: int,
        merged: MergedModel | None = None,
    ) -> None:
        """Decode and grade those of the first `count` problems that a candidate has not answered.

        Args:
            numbers: the structure's numbers.
            candidate: the candidate.
            count: number of problems.
            merged: its merge, if the last one was this; else it is merged again.
        """
        done = {outcome.problem_id for outcome in self.outcomes(candidate)}
        missing = [item for item in self._problems[:count] if item.problem.id not in done]
        if not candidate.finite or not missing:
            return
        merged = merged or self._merge(numbers.tunable, _values(candidate))
        unsaved: list[CandidateOutcome] = []

        def save(outcome: Outcome) -> None:
            unsaved.append(
                CandidateOutcome(
                    structure=candidate.structure, number=candidate.number, outcome=outcome
                )
            )
            if len(unsaved) == _OUTCOMES_PER_COMMIT:
                self._store.save(*unsaved)
                unsaved.clear()

        context = self._context
        evaluate_problems(
            *(context.eval_decoder, context.tokenizer, merged.params, context.task, missing),
            on_outcome=save,
        )
        self._store.save(*unsaved)


def _values(candidate: Candidate) -> np.ndarray:
    """Return the values of a candidate [parameters]."""
    return np.array(list(candidate.constants.values()))
