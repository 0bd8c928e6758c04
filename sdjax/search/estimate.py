"""Estimate of the time that is left of a run, from rates that this process has measured."""

from __future__ import annotations

from dataclasses import dataclass

from sdjax.core.progress import format_duration
from sdjax.search.announcement import tuned_method_count
from sdjax.search.grids import grid_methods
from sdjax.search.plan import RunPlan
from sdjax.search.ranking import complete_scores
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, NOT_JUDGED, TEST, Checkpoint, program_entry

# Phases whose rate no other phase tells, and what they are called in the estimate.
_NAMES = {"generate": "sampling", "admit": "checking", "refine": "training"}


@dataclass(frozen=True, kw_only=True)
class WorkLeft:
    """Units of work that are left, by phase.

    Attributes:
        baselines: baselines to score on the development problems.
        generate: programs to sample.
        admit: programs to judge.
        score: programs to score; all samples count as novel until the share is known.
        refine: generators to train.
        test: models to score on the test problems.
    """

    baselines: int
    generate: int
    admit: int
    score: float
    refine: int
    test: int


def work_left(plan: RunPlan, store: Store) -> WorkLeft:
    """Return the work that a run has left."""
    config = plan.config
    scores = complete_scores(store, config.task.metric)
    baselines = 1 + len(config.slots) + len(grid_methods(config))
    judged = store.judged()
    known = [sample for sample in judged if sample.status != NOT_JUDGED]
    novel_share = sum(sample.novel for sample in known) / len(known) if known else 1.0
    unscored = sum(
        sample.novel and program_entry(sample.identity or "") not in scores for sample in known
    )
    generated = {iteration for iteration, phase in store.phases() if phase == "generate"}
    to_sample = sum(
        max(0, config.generation.samples - len(store.sample_numbers(iteration)))
        for iteration in range(1, config.iterations + 1)
        if iteration not in generated
    )
    to_judge = to_sample + len(judged) - len(known)
    trained = len(store.select(Checkpoint)) if config.training.enabled else config.iterations
    per_setting = 1 + len(config.slots) + tuned_method_count(config) + config.test.top_k
    tested = sum(summary.complete for summary in store.summaries(TEST, None))
    return WorkLeft(
        baselines=max(0, baselines - sum(not name.startswith("program:") for name in scores)),
        generate=to_sample,
        admit=to_judge,
        score=unscored + novel_share * to_judge,
        refine=max(0, config.iterations - trained),
        test=max(0, per_setting * len(plan.settings) - tested),
    )


def describe_time_left(plan: RunPlan, store: Store, rates: dict[str, float]) -> str | None:
    """Return a sentence such as "about 2 min 40 s left".

    Args:
        plan: the run's plan.
        store: the run's store.
        rates: seconds per unit of the measured phases; see `WorkLeft` for their units.

    Returns:
        the sentence, which names the phases that it leaves out since they are not measured yet; or
        None if no model has been scored.
    """
    model = rates.get("score", rates.get("baselines"))
    if model is None:
        return None
    problems = plan.problems
    longer = len(problems[TEST]) / len(problems[DEVELOPMENT])
    known = {"baselines": model, "score": model, "test": longer * model} | rates
    left = vars(work_left(plan, store))
    seconds = sum(count * known[phase] for phase, count in left.items() if phase in known)
    missing = [name for phase, name in _NAMES.items() if left[phase] and phase not in known]
    bound = "at most" if left["score"] and "score" not in rates else "about"
    sentence = f"{bound} {format_duration(seconds)} left"
    if not missing:
        return sentence
    listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    return f"{sentence} for scoring; {listed} not measured yet"


def units_done(store: Store, phase: str) -> int:
    """Return the number of finished units of a phase, over all iterations."""
    match phase:
        case "generate":
            return len(store.judged())
        case "admit":
            return sum(sample.status != NOT_JUDGED for sample in store.judged())
        case "refine":
            return len(store.select(Checkpoint))
        case "test":
            return sum(summary.complete for summary in store.summaries(TEST, None))
    return sum(summary.complete for summary in store.summaries(DEVELOPMENT))
