"""Tuned controls that change their base, as the run's programs may (`coevolution.base`).

A run that promotes its best merged model applies one merge after another. A control that is tuned
once on the seed would be at a disadvantage, so each family is also tuned in steps: it is tuned on
the seed, and if the result is better than the seed by the rule of `sdjax.search.promotion`, it is
the base of the next step, on which the family is tuned again, such as task arithmetic that is
applied twice. There are as many steps as iterations, and each has an equal share of the budget of
the control that is tuned once. Every step is a control of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sdjax.core.progress import progress_bar
from sdjax.search.baselines import score_baseline
from sdjax.search.bases import context_on_base
from sdjax.search.context import RunContext
from sdjax.search.control_search import control_detail, search_control
from sdjax.search.controls import control_names
from sdjax.search.promotion import compare_with_base, is_above_base
from sdjax.search.score_types import Promotion
from sdjax.search.store import Store
from sdjax.search.tune import training_texts
from sdjax.search.types import DEVELOPMENT, Entry
from sdjax.training.packing import Example
from sdjax.tuning.search import SearchConfig


def tune_controls_in_steps(context: RunContext, store: Store, search: SearchConfig) -> None:
    """Tune each control family in steps, if bases may change and there are several iterations.

    What an interrupted call has saved is not computed again.

    Args:
        context: the loaded run.
        store: the run's store.
        search: settings of the search of a control that is tuned once, with its budget.
    """
    config = context.config
    steps = min(config.iterations, search.budget)
    if config.coevolution is None or not config.coevolution.base or steps < 2:
        return
    examples = training_texts(context)
    families = control_names(config)
    with progress_bar("controls in steps", len(families)) as advance:
        for family in families:
            _tune_in_steps(context, store, family, search, examples, steps)
            advance()


def _tune_in_steps(
    context: RunContext,
    store: Store,
    family: str,
    search: SearchConfig,
    examples: Sequence[Example],
    steps: int,
) -> None:
    purpose = f"{family} in {steps} steps, budget {search.budget}"
    base = None
    for step in range(1, steps + 1):
        name = f"method:{family}, tuned, step {step} of {steps}"
        if store.select(Entry, name=name) and not _is_of(store, name, search.budget):
            name = f"{name} ({search.budget} evaluations)"
        if not store.select(Entry, name=name):
            (result,) = search_control(
                context_on_base(context, store, base),
                store,
                family,
                dataclasses.replace(search, budget=search.budget // steps),
                examples,
                folder=f"{family.replace(':', '-')}-{search.budget}-step-{step}-of-{steps}",
            )[-1:]
            detail = control_detail(context, family, search.budget, result)
            detail |= {"base": base, "step": step}
            store.save(Entry(name=name, kind="method", detail=detail))
        (entry,) = store.select(Entry, name=name)
        score_baseline(context, store, name, entry.detail, DEVELOPMENT)
        if step == steps or not store.is_complete(name, DEVELOPMENT):
            return
        if not store.select(Promotion, purpose=purpose, iteration=step):
            decision = Promotion(purpose=purpose, iteration=step, base=base)
            if is_above_base(store, context.config.task.metric, name, base):
                decision = compare_with_base(
                    context, store, None, entry, base, purpose=purpose, iteration=step
                )
            store.save(dataclasses.replace(decision, is_base=decision.low > 0))
        (decision,) = store.select(Promotion, purpose=purpose, iteration=step)
        if not decision.is_base:
            return
        base = name


def _is_of(store: Store, name: str, budget: int) -> bool:
    (entry,) = store.select(Entry, name=name)
    return bool(entry.detail.get("budget") == budget)
