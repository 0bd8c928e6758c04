"""Estimate of the time that is left of a run, from rates that this process has measured."""

from __future__ import annotations

from dataclasses import dataclass

from sdjax.core.progress import format_duration
from sdjax.search.announcement import tuned_method_count
from sdjax.search.baselines import expert_entry, tuned_methods
from sdjax.search.controls import tuned_controls
from sdjax.search.grids import grid_methods
from sdjax.search.plan import RunPlan
from sdjax.search.ranking import complete_scores, development_scores, ranked_programs
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, NOT_JUDGED, TEST, Checkpoint, program_entry

# Phases without a rate until they are measured, and what an estimate without them leaves out.
_LEFT_OUT = {
    "generate": "sampling",
    "admit": "checking",
    "score": "the trial and compilation of programs",
    "refine": "training",
}


@dataclass(frozen=True, kw_only=True)
class WorkLeft:
    """Units of work that are left, by phase.

    Attributes:
        baselines: baselines to score on the development problems.
        generate: programs to sample.
        admit: programs to judge.
        score: programs to score; all samples count as novel until the share is known.
        refine: generators to train.
        test: models to score on the test problems. Tested programs that are no longer among the
            best are not counted as done.
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
    fixed = ["seed", *map(expert_entry, config.slots)]
    refused = {one.entry for one in store.select(Application, setting=MAIN) if not one.admitted}
    baselines = sum(
        name not in scores and name not in refused for name in (*fixed, *grid_methods(config))
    )
    judged = store.judged()
    known = [sample for sample in judged if sample.status != NOT_JUDGED]
    novel_share = sum(sample.novel for sample in known) / len(known) if known else 1.0
    started = development_scores(store, config.task.metric)
    unscored = sum(
        sample.novel and program_entry(sample.identity or "") not in started for sample in known
    )
    generated = {iteration for iteration, phase in store.phases() if phase == "generate"}
    to_sample = sum(
        max(0, config.generation.samples - len(store.sample_numbers(iteration)))
        for iteration in range(1, config.iterations + 1)
        if iteration not in generated
    )
    to_judge = to_sample + len(judged) - len(known)
    trained = {checkpoint.iteration for checkpoint in store.select(Checkpoint)}
    tuned = [*tuned_methods(config, store), *tuned_controls(store)]
    methods = tuned_method_count(config) if baselines else len(tuned)
    per_setting = len(fixed) + methods + config.test.top_k
    best = [entry.name for entry in ranked_programs(store, config.task.metric)]
    wanted = {*fixed, *tuned, *best[: config.test.top_k]}
    tested = sum(one.complete and one.entry in wanted for one in store.summaries(TEST, None))
    return WorkLeft(
        baselines=baselines,
        generate=to_sample,
        admit=to_judge,
        score=unscored + novel_share * to_judge,
        refine=len(set(config.trained_iterations) - trained),
        test=max(0, per_setting * len(plan.settings) - tested),
    )


def describe_time_left(plan: RunPlan, store: Store, rates: dict[str, float]) -> str | None:
    """Return a sentence such as "about 2 min 40 s left".

    Until programs have been scored, their models are assumed to take as long as the baselines.

    Args:
        plan: the run's plan.
        store: the run's store.
        rates: seconds per unit of the measured phases; see `WorkLeft` for their units.

    Returns:
        the sentence, which names what it leaves out since it is not measured yet; or None if no
        rate of scoring is known.
    """
    model = rates.get("score", rates.get("baselines"))
    if model is None:
        return None
    problems = plan.problems
    longer = len(problems[TEST]) / len(problems[DEVELOPMENT])
    known = {"baselines": model, "score": model, "test": longer * model} | rates
    left = vars(work_left(plan, store))
    seconds = sum(count * known[phase] for phase, count in left.items() if phase in known)
    missing = [name for phase, name in _LEFT_OUT.items() if left[phase] and phase not in rates]
    sentence = f"about {format_duration(seconds)} left"
    if not missing:
        return sentence
    return f"{sentence} for scoring; not measured yet, so not included: {', '.join(missing)}"


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
    return len(store.summaries(DEVELOPMENT))
