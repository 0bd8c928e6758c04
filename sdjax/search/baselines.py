"""Baselines for discovered programs: the seed, the experts, and tuned human-designed methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdjax.core.progress import progress_bar
from sdjax.sandbox.refusal import NON_FINITE, Refusal
from sdjax.sandbox.verdict import ADMITTED
from sdjax.search.bases import context_on_base
from sdjax.search.config import RunConfig
from sdjax.search.context import ScoringContext
from sdjax.search.controls import method_algorithm
from sdjax.search.grids import grid_methods
from sdjax.search.ranking import best_by_group, complete_scores
from sdjax.search.score_types import Application
from sdjax.search.scoring import score
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, Entry

SEED = "seed"  # name of the seed's entry


def expert_entry(slot: str) -> str:
    """Return the entry name of an expert."""
    return f"expert:{slot}"


def score_baselines(
    context: ScoringContext, store: Store, *, on_scored: Callable[[], None] = lambda: None
) -> None:
    """Score the seed, the experts and every grid point on the development problems.

    Args:
        context: the loaded run.
        store: the run's store.
        on_scored: called after each baseline that had no score yet.
    """
    experts = [expert_entry(slot) for slot in context.config.slots]
    methods = grid_methods(context.config)
    kinds = {SEED: "seed"} | dict.fromkeys(experts, "expert") | dict.fromkeys(methods, "method")
    missing = [name for name in kinds if not _is_settled(store, name, DEVELOPMENT, MAIN)]
    done = len(kinds) - len(missing)
    with progress_bar("baselines", len(kinds), completed=done) as advance:
        for name in missing:
            store.save(Entry(name=name, kind=kinds[name], detail=methods.get(name, {})))
            score_baseline(context, store, name, methods.get(name), DEVELOPMENT)
            advance()
            on_scored()


def score_baseline(
    context: ScoringContext,
    store: Store,
    name: str,
    detail: Mapping[str, Any] | None,
    split: str,
    setting: str = MAIN,
) -> None:
    """Score one baseline on a split.

    Args:
        context: the loaded run.
        store: the run's store.
        name: entry name.
        detail: method and hyperparameters, or family and tuned values; None for the seed and the
            experts.
        split: "development", "confirmation" or "test".
        setting: name of the setting whose models are merged.
    """
    if _is_settled(store, name, split, setting):
        return
    if detail is not None:
        try:
            context = context_on_base(context, store, detail.get("base"), setting)
        except Refusal as refusal:
            store.save(
                Application(
                    entry=name,
                    setting=setting,
                    verdict=refusal.verdict,
                    rule=refusal.rule,
                    message=refusal.message,
                    change=0.0,
                )
            )
            return
        merged = context.merge(method_algorithm(context, detail), setting)
        verdict = ADMITTED if merged.finite else NON_FINITE
        store.save(Application(entry=name, setting=setting, verdict=verdict, change=merged.change))
        if merged.finite:
            score(context, store, name, merged.params, split, setting)
    elif name == SEED:
        score(context, store, name, context.seed, split, setting)
    else:
        slot = name.removeprefix("expert:")
        params = context.with_expert(context.config.slots.index(slot), setting)
        score(context, store, name, params, split, setting)


def tuned_methods(config: RunConfig, store: Store) -> list[str]:
    """Return the best entry of each method on each grid, without duplicates."""
    groups = [
        (f"{grid}: {detail['method']}", name)
        for name, detail in grid_methods(config).items()
        for grid in detail["grids"]
    ]
    best = best_by_group(groups, complete_scores(store, config.task.metric))
    return list(dict.fromkeys(best.values()))


def _is_settled(store: Store, name: str, split: str, setting: str) -> bool:
    """Return whether a baseline has its score, or cannot have one since its merge is not finite."""
    application = store.by_key(Application, setting=setting).get(name)
    refused = application is not None and not application.admitted
    return refused or store.is_complete(name, split, setting)
