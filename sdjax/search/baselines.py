"""What programs have to beat: the seed, the experts, and tuned human-designed methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sdjax.core.progress import progress_bar
from sdjax.merging.methods.registry import algorithm
from sdjax.search.config import RunConfig, method_candidate
from sdjax.search.context import RunContext
from sdjax.search.phases import development_scores, is_scored, score
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, Application, Candidate

GRIDS: tuple[Literal["paper", "fine"], ...] = ("paper", "fine")


def expert_candidate(slot: str) -> str:
    return f"expert:{slot}"


def grid_methods(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Candidate to its detail (method, hyperparameters, the grids it stands in)."""
    methods: dict[str, dict[str, Any]] = {}
    for grid in GRIDS:
        for method, hyperparameters in config.baselines.combinations(grid):
            name = method_candidate(method, hyperparameters)
            detail = {"method": method, "hyperparameters": hyperparameters, "grids": []}
            methods.setdefault(name, detail)["grids"].append(grid)
    return methods


def check_methods(config: RunConfig) -> None:
    """Raises UserError where a grid names a method or a hyperparameter that there is none of."""
    for detail in grid_methods(config).values():
        algorithm(detail["method"], **detail["hyperparameters"])


def score_baselines(bench: RunContext, store: Store) -> None:
    """Scores the seed, the experts and every point of the grids on the development problems."""
    for name, kind in [("seed", "seed")] + [
        (expert_candidate(slot), "expert") for slot in bench.config.slots
    ]:
        store.save_candidate(Candidate(name=name, kind=kind))
    methods = grid_methods(bench.config)
    names = ["seed", *map(expert_candidate, bench.config.slots), *methods]
    with progress_bar("baselines", len(names)) as advance:
        for name in names:
            if name in methods:
                store.save_candidate(Candidate(name=name, kind="method", detail=methods[name]))
            score_baseline(bench, store, name, methods.get(name), DEVELOPMENT)
            advance()


def score_baseline(
    bench: RunContext,
    store: Store,
    name: str,
    detail: Mapping[str, Any] | None,
    split: str,
    setting: str = MAIN,
) -> None:
    """Scores one of `score_baselines`' candidates on any split and setting."""
    if is_scored(store, name, split, setting):
        return
    if detail is not None:
        merged = bench.merge(algorithm(detail["method"], **detail["hyperparameters"]), setting)
        verdict = "admitted" if merged.finite else "non-finite"
        store.save_application(
            Application(candidate=name, setting=setting, verdict=verdict, change=merged.change)
        )
        if merged.finite:
            score(bench, store, name, merged.params, split, setting)
    elif name == "seed":
        score(bench, store, name, bench.seed, split, setting)
    else:
        slot = name.removeprefix("expert:")
        params = bench.with_expert(bench.config.slots.index(slot), setting)
        score(bench, store, name, params, split, setting)


def tuned_methods(bench: RunContext, store: Store) -> list[str]:
    """The best candidate of each method on each grid, by development score; each once."""
    scores = development_scores(bench, store)
    best: dict[tuple[str, str], str] = {}
    for name, detail in grid_methods(bench.config).items():
        for grid in detail["grids"]:
            place = (grid, detail["method"])
            if name in scores and scores[name] > scores.get(best.get(place, ""), -1.0):
                best[place] = name
    return list(dict.fromkeys(best.values()))
