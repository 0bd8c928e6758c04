"""Estimate of the time that is left of a run, from rates that this process has measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sdjax.core.progress import format_duration
from sdjax.search.announcement import tuned_method_count
from sdjax.search.baselines import expert_entry, tuned_methods
from sdjax.search.budget import TUNING
from sdjax.search.config import RunConfig
from sdjax.search.controls import (
    control_names,
    is_tuned_control,
    program_controls,
    samples_of_control,
    tuned_controls,
)
from sdjax.search.generator_plan import available_programs
from sdjax.search.grids import grid_methods
from sdjax.search.plan import RunPlan
from sdjax.search.ranking import complete_scores, development_scores, ranked_programs
from sdjax.search.run_limits import end_reason, is_trained, planned_samples
from sdjax.search.score_types import Application, Promotion
from sdjax.search.store import Store
from sdjax.search.types import (
    CONFIRMATION,
    DEVELOPMENT,
    MAIN,
    NOT_JUDGED,
    PURPOSES,
    RANDOM,
    SEARCH,
    TEST,
    UNTRAINED,
    Checkpoint,
    Entry,
    phase_name,
    program_entry,
)

# Phases without a rate until they are measured, and what an estimate without them leaves out.
_LEFT_OUT = {
    "generate": "sampling",
    "admit": "checking",
    "score": "the trial and compilation of programs",
    "refine": "training",
    "tune": "tuning of programs",
    "controls": "tuned controls",
}


@dataclass(frozen=True, kw_only=True)
class WorkLeft:
    """Units of work that are left, by phase.

    Attributes:
        baselines: baselines to score on the development problems.
        generate: programs to sample, at most; control programs may reach their budget earlier.
        admit: programs to judge, at most.
        score: programs to score; all samples count as novel until the share is known.
        refine: generators to train.
        tune: programs to tune.
        controls: controls to tune.
        test: models to score on the test problems. Tested programs that are no longer among the
            best are not counted as done.
    """

    baselines: int
    generate: int
    admit: int
    score: float
    refine: int
    tune: int
    controls: int
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
    judged = [sample for purpose in PURPOSES for sample in store.judged(purpose=purpose)]
    known = [sample for sample in judged if sample.status != NOT_JUDGED]
    novel_share = sum(sample.novel for sample in known) / len(known) if known else 1.0
    started = development_scores(store, config.task.metric)
    unscored = {
        sample.identity
        for sample in known
        if sample.novel and program_entry(sample.identity or "") not in started
    }
    phases, planned = store.phases(), planned_samples(config, store)
    if end_reason(config, store) is not None:
        planned = tuple(n for i, n in enumerate(planned, 1) if (i, "score") in phases)
    to_sample = sum(
        max(0, count - len(store.sample_numbers(iteration)))
        for iteration, count in enumerate(planned, 1)
    )
    available = available_programs(config, plan.generators)
    if available is not None:
        to_sample = min(to_sample, max(0, available - len(store.judged())))
    random = 0
    if not {(0, "controls"), (0, "test")} & phases.keys():
        for purpose in program_controls(config):
            left = samples_of_control(config, purpose) - len(store.judged(purpose=purpose))
            to_sample += left if purpose == UNTRAINED else 0
            random += left if purpose == RANDOM else 0
    to_judge = to_sample + random + len(judged) - len(known)
    trained = {checkpoint.iteration for checkpoint in store.select(Checkpoint)}
    tuned = [*tuned_methods(config, store), *tuned_controls(store)]
    methods = tuned_method_count(config) if baselines else len(tuned)
    purposes = (SEARCH, *program_controls(config))
    per_setting = len(fixed) + methods + len(purposes) * config.test.top_k
    wanted = {*fixed, *tuned}
    for purpose in purposes:
        best = ranked_programs(store, config.task.metric, purpose)[: config.test.top_k]
        wanted |= {entry.name for entry in best}
    tested = sum(one.complete and one.entry in wanted for one in store.summaries(TEST, None))
    return WorkLeft(
        baselines=baselines,
        generate=to_sample,
        admit=to_judge,
        score=len(unscored) + novel_share * to_judge,
        refine=sum(
            is_trained(config, store, n) for n in range(1, len(planned) + 1) if n not in trained
        ),
        tune=_programs_to_tune(config, phases),
        controls=len(set(control_names(config)) - _tuned_families(store)),
        test=max(0, per_setting * len(plan.settings) - tested),
    )


def _programs_to_tune(config: RunConfig, phases: Collection[tuple[int, str]]) -> int:
    if config.tuning is None:
        return 0
    purposes = (SEARCH, *program_controls(config))
    left = [purpose for purpose in purposes if (0, phase_name("tune", purpose)) not in phases]
    return config.tuning.programs * len(left)


def _tuned_families(store: Store) -> set[str]:
    return {e.detail["family"] for e in store.by_key(Entry).values() if is_tuned_control(e)}


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
    judged = [sample for purpose in PURPOSES for sample in store.judged(purpose=purpose)]
    match phase:
        case "generate":
            return sum(sample.purpose != RANDOM for sample in judged)
        case "admit":
            return sum(sample.status != NOT_JUDGED for sample in judged)
        case "promote":
            return len(store.select(Promotion))
        case "refine":
            return len(store.select(Checkpoint))
        case "tune":
            return sum(TUNING in entry.detail for entry in store.by_key(Entry).values())
        case "controls":
            return len(_tuned_families(store))
        case "confirm" | "ablate":
            return sum(summary.complete for summary in store.summaries(CONFIRMATION))
        case "test":
            return sum(summary.complete for summary in store.summaries(TEST, None))
    return len(store.summaries(DEVELOPMENT))
