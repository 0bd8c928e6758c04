"""Results of a run: its best programs, and the methods as they were tuned on its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sdjax.core.errors import UserError
from sdjax.search.base_chains import chain_of_entry
from sdjax.search.baselines import tuned_methods
from sdjax.search.config import RunConfig
from sdjax.search.controls import control_budget, is_tuned_control, open_control, tuned_controls
from sdjax.search.limits import limits_of_run
from sdjax.search.plan import ScoringPlan
from sdjax.search.ranking import complete_scores, final_ranking, ranked
from sdjax.search.store import Store
from sdjax.search.types import Entry, Program
from sdjax.sharding.multihost import broadcast_from_main, is_main_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winners:
    """Best programs and methods of a run, selected on its own experts.

    Attributes:
        config: config of the run.
        programs: its best programs, best first.
        bases: the other programs of the chains that end with them, which make their bases.
        methods: the best hyperparameters of each human-designed method on each grid, and the tuned
            controls, best first, as entries whose names differ from those of a transfer.
        families: the families and methods that the run tuned as controls.
        budget: the number of development evaluations that it allowed each of them; None if it has
            not tuned any.
    """

    config: RunConfig
    programs: tuple[Program, ...]
    bases: tuple[Program, ...] = ()
    methods: tuple[Entry, ...]
    families: tuple[str, ...]
    budget: int | None

    def untouched(self) -> dict[str, Any]:
        """Return name to details of the methods, JSON-compatible."""
        return {entry.name: dict(entry.detail) for entry in self.methods}


def read_winners(
    run: Path, top_k: int, *, allow_missing: Collection[str], trust_limits: bool
) -> Winners:
    """Return the best programs and methods of a run.

    Args:
        run: folder of the run, which only the main process reads.
        top_k: number of programs.
        allow_missing: layers of confinement that this machine may lack, whatever the run says.
        trust_limits: use limits of the run that are above the defaults.

    Raises:
        UserError: the run does not exist, has too few scored programs, or has limits that are not
            trusted.
    """
    with _open_run(run) as store:
        config = store.config()
        limits = limits_of_run(config, run, trusted=trust_limits)
        sandbox = dataclasses.replace(limits, allow_missing=tuple(allow_missing))
        config = dataclasses.replace(config, sandbox=sandbox)
        programs = final_ranking(store, config.task.metric)
        if len(programs) < top_k:
            raise UserError(
                f"{run}: the run has {len(programs)} scored programs, fewer than {top_k}; "
                + ("lower --top-k" if programs else "resume it until it has some")
            )
        entries, scores = store.by_key(Entry), complete_scores(store, config.task.metric)
        names = [*tuned_methods(config, store), *tuned_controls(store)]
        best = ranked({name: scores[name] for name in names if name in scores})
        controls = [entries[name] for name in best if is_tuned_control(entries[name])]
        return Winners(
            config=config,
            programs=tuple(store.program(entry.identity or "") for entry in programs[:top_k]),
            bases=_bases(store, programs[:top_k]),
            methods=tuple(_untouched(entries[name]) for name in best),
            families=tuple(dict.fromkeys(entry.detail["family"] for entry in controls)),
            budget=max((control_budget(entry) for entry in controls), default=0) or None,
        )


def controls_that_fit(
    plan: ScoringPlan, methods: Collection[Entry]
) -> tuple[list[Entry], dict[str, str]]:
    """Return the tuned controls of a run that can merge the models of a plan.

    Args:
        plan: the plan of a transfer.
        methods: methods of a run.

    Returns:
        the entries, and the reason for each control that does not fit, by name of the entry.
    """
    entries, refused = [], {}
    for entry in methods:
        if "family" not in entry.detail:
            continue
        if reason := _why_unfit(plan, entry.detail):
            refused[entry.name] = reason
        else:
            entries.append(entry)
    return entries, refused


def _why_unfit(plan: ScoringPlan, detail: Mapping[str, Any]) -> str | None:
    """Return why the numbers of a control are not those of the plan's models; None if they are."""
    try:
        names = [parameter.name for parameter in open_control(plan, detail["family"]).parameters]
    except UserError as error:
        return str(error)
    tuned = detail.get("names", names)  # earlier versions did not store them
    if list(tuned) == names and len(detail["values"]) == len(names):
        return None
    unknown = next((name for name in tuned if name not in names), None)
    example = "" if unknown is None else f", such as {unknown}"
    return (
        f"it has {len(detail['values'])} numbers{example}, and these models {len(names)}, since a "
        "number belongs to a tensor or a layer"
    )


def _untouched(entry: Entry) -> Entry:
    """Return a method of a run as an entry of a transfer, which may tune the same control."""
    if not is_tuned_control(entry):
        return entry
    detail = {**entry.detail, "untouched": True}
    if isinstance(base := detail.get("base"), str):
        detail["base"] = _untouched_name(base)
    return dataclasses.replace(entry, name=_untouched_name(entry.name), detail=detail)


def _untouched_name(name: str) -> str:
    return f"{name} in the run"


def _bases(store: Store, programs: Sequence[Entry]) -> tuple[Program, ...]:
    """Return the programs that some programs are applied after, and that are not among them."""
    own = {entry.name for entry in programs}
    chains = [one for entry in programs for one in chain_of_entry(store, entry)]
    others = {one.name: one.identity for one in chains if one.name not in own}
    return tuple(store.program(identity or "") for identity in others.values())


def _open_run(run: Path) -> Store:
    """Open a run; with several processes, the main one reads it for all."""
    if jax.process_count() == 1:
        return Store.open(run)
    if not is_main_process():
        return Store.mirror(run, broadcast_from_main(bytes))
    store = Store.open(run)
    broadcast_from_main(store.content)
    return store
