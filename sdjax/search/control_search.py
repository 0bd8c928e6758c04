"""Tuning of the controls: each has the budget that the run's own programs had.

A discovered program is worth something only if it beats what the same effort gives without it. Each
control is tuned with at most as many evaluations of the development problems as the run's programs
have used, in the search and in their own tuning. The gradient on training problems comes first,
since it overfits the development problems least; CMA-ES continues from its result. A search that no
longer improves leaves the rest of its budget.

CMA-ES chooses by development scores alone, so it may gain on these problems and lose on others. If
it has changed the result of the gradient, that result is a control of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from sdjax.core.progress import progress_bar
from sdjax.search.baselines import score_baseline
from sdjax.search.budget import spent, spent_on_tuning
from sdjax.search.context import RunContext, ScoringContext
from sdjax.search.controls import control_names, is_tuned_control, open_control, tuned_controls
from sdjax.search.store import Store
from sdjax.search.tune import (
    TUNING_FOLDER,
    candidate_scorer,
    differentiable_loss,
    run_once,
    training_texts,
)
from sdjax.search.types import DEVELOPMENT, SEARCH, Entry
from sdjax.training.packing import Example
from sdjax.tuning.evolution import search_by_evolution
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.search import Evaluations, SearchConfig
from sdjax.tuning.trace import Trace

# Initial standard deviation of CMA-ES around the result of the gradient, relative to that of a
# search from the start: most candidates of a wide distribution would be worse by far.
_LOCAL = 0.25


def tune_controls(context: ScoringContext, store: Store, search: SearchConfig) -> None:
    """Tune the controls and score the results on the development problems.

    Each search has a trace in the run folder, `tuning/NAME-BUDGET/`, and resumes from it. If the
    budget has grown since a run was extended, the controls are tuned again.

    Args:
        context: the loaded run.
        store: the run's store.
        search: settings of each search.
    """
    families = control_names(context.config)
    if not families:
        return
    budget = search.budget
    done = {
        entry.detail["family"]
        for entry in store.by_key(Entry).values()
        if is_tuned_control(entry)
        and entry.detail["budget"] == budget
        and "step" not in entry.detail
    }
    missing = [family for family in families if family not in done]
    examples = training_texts(context) if missing else []
    total = len(families)
    with progress_bar("controls", total, completed=total - len(missing)) as advance:
        for family in missing:
            _tune_control(context, store, family, search, examples)
            advance()
    entries = store.by_key(Entry)
    for name in tuned_controls(store):  # unless the run was interrupted in between
        score_baseline(context, store, name, entries[name].detail, DEVELOPMENT)


def control_settings(context: RunContext, store: Store) -> SearchConfig:
    """Return the settings of the search of each control of a run.

    The budget is what the programs of the search have used, rounded down to evaluations of all
    development problems, and at least one.
    """
    controls = context.config.controls
    problems = spent(store, SEARCH).problems + spent_on_tuning(store, SEARCH).problems
    evaluations = problems // len(context.problems[DEVELOPMENT])
    if controls is not None and controls.max_evaluations is not None:
        evaluations = min(evaluations, controls.max_evaluations)
    budget, tuning = max(1, evaluations), context.config.tuning
    if tuning is None:
        return SearchConfig(budget=budget)
    return dataclasses.replace(tuning.search, budget=budget, starts=1)


def _tune_control(
    context: ScoringContext,
    store: Store,
    family: str,
    search: SearchConfig,
    examples: Sequence[Example],
) -> None:
    budget = search.budget
    folder = f"{family.replace(':', '-')}-{budget}"
    results = search_control(context, store, family, search, examples, folder=folder)
    last = results[-1]
    if last["values"] == results[0]["values"]:  # of the same numbers, one entry
        results = [last]
    store.save(
        *(
            Entry(
                name=_entry_name(store, family, result is last, budget),
                kind="method",
                detail=control_detail(context, family, budget, result),
            )
            for result in results
        )
    )


def search_control(
    context: ScoringContext,
    store: Store,
    family: str,
    search: SearchConfig,
    examples: Sequence[Example],
    *,
    folder: str,
) -> list[dict[str, Any]]:
    """Search the numbers of a control, by gradient and then by CMA-ES.

    Args:
        context: the loaded run, on the base that the control is applied to.
        store: the run's store.
        family: name of the control.
        search: settings of the search.
        examples: the task's training problems.
        folder: name of the folder of its trace.

    Returns:
        the results after the gradient, if there is one, and at the end.
    """
    tunable, budget = open_control(context, family), search.budget
    loss = differentiable_loss(context, tunable, examples, search, partly=True)
    loss = run_once(context, tunable, loss)
    path = store.folder / TUNING_FOLDER / folder
    settings = {"tuned": tunable.name, "start": tunable.start.tolist(), "budget": budget}
    results: list[dict[str, Any]] = []  # after the gradient, and at the end
    with Trace(path, settings) as trace:
        score = partial(candidate_scorer(context, tunable), problems=context.problems[DEVELOPMENT])
        evaluations = Evaluations(score, budget, trace)

        def save_result(optimizer: str) -> None:
            assert evaluations.best is not None
            results.append(
                {
                    "names": [parameter.name for parameter in tunable.parameters],
                    "values": evaluations.best["values"],
                    "optimizer": optimizer,
                    "evaluations": evaluations.count,
                    "seconds": round(trace.seconds * jax.device_count(), 1),
                }
            )

        if loss is not None:
            search_by_gradient(tunable, loss, evaluations, search, trace)
            save_result("gradient")
        if evaluations.count < budget:
            if loss is not None:
                search = dataclasses.replace(search, sigma=_LOCAL * search.sigma)
            search_by_evolution(
                tunable, evaluations, search, resume=loss is not None, patience=search.patience
            )
            save_result("CMA-ES" if loss is None else "gradient, then CMA-ES")
    return results


def control_detail(
    context: ScoringContext, family: str, budget: int, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the details of the entry of a tuned control.

    Args:
        context: the loaded run.
        family: name of the control.
        budget: number of evaluations that it was allowed.
        result: a result of `search_control`.
    """
    problems = result["evaluations"] * len(context.problems[DEVELOPMENT])
    return {
        "family": family,
        "constants": len(result["values"]),
        "grids": ["tuned"],
        "budget": budget,
        "problems": problems,
        **result,
    }


def _entry_name(store: Store, family: str, is_last: bool, budget: int) -> str:
    """Return the name of a result; with its budget if an earlier budget has the plain name."""
    name = f"method:{family}, tuned" if is_last else f"method:{family}, tuned by gradient"
    taken = store.by_key(Entry).get(name)
    if taken is None or taken.detail["budget"] == budget:
        return name
    return f"{name} ({budget} evaluations)"
