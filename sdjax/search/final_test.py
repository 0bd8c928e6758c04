"""The final evaluation of a run and of a transfer: confirmation, then the test, once.

Finalists and controls are scored on the confirmation problems, which choose the one that the answer
is about, before any of them is scored on the test problems. Each time that entries are added to the
test, an opening is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdjax.core.progress import progress_bar
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.baselines import expert_entry, score_baseline, tuned_methods
from sdjax.search.config import RunConfig
from sdjax.search.context import ScoringContext
from sdjax.search.controls import program_controls, tuned_controls
from sdjax.search.ranking import finalists, winners_so_far
from sdjax.search.score_types import TestOpening
from sdjax.search.scoring import score_program
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, MAIN, SEARCH, TEST, Entry

Entries = Mapping[str, str | None]
"""The identity of each program, and None for each baseline, by name of the entry."""


def final_entries(config: RunConfig, store: Store) -> Entries:
    """Return what is confirmed and tested: baselines, controls, and the finalists.

    Args:
        config: the run's config.
        store: the run's store. Confirmation scores may add the other form of the best program; see
            `sdjax.search.ranking.finalists`.
    """
    names = [
        "seed",
        *map(expert_entry, config.slots),
        *tuned_methods(config, store),
        *tuned_controls(store),
    ]
    programs = [
        program
        for purpose in (SEARCH, *program_controls(config))
        for program in finalists(store, config.task.metric, config.test.top_k, purpose)
    ]
    return {**dict.fromkeys(names), **{program.name: program.identity for program in programs}}


def earlier_bests(config: RunConfig, store: Store) -> Entries:
    """Return the programs that were the best ones at some point, and are not finalists.

    Args:
        config: the run's config.
        store: the run's store.
    """
    entries, final = store.by_key(Entry), final_entries(config, store)
    names = winners_so_far(store, config.task.metric).values()
    return {name: entries[name].identity for name in names if name not in final}


def confirm(context: ScoringContext, store: Store, sandbox: Sandbox | None) -> None:
    """Score finalists and controls on the confirmation problems, if there are any.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
    """
    if CONFIRMATION not in context.problems:
        return
    for _ in range(2):  # the scores may add the other form of the best program
        entries = final_entries(context.config, store)
        _score_entries(context, store, sandbox, entries, CONFIRMATION, [MAIN], title="confirm")


def score_run_test(context: ScoringContext, store: Store, sandbox: Sandbox | None) -> None:
    """Score what `final_entries` returns on the test problems.

    The earlier bests are scored on both splits, after they were recorded as no finalists.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
    """
    entries, others = final_entries(context.config, store), earlier_bests(context.config, store)
    record_opening(store, entries, MAIN, others)
    score_test(context, store, sandbox, entries)
    for split in (CONFIRMATION, TEST):
        if split in context.problems:
            title = f"{split} of earlier bests"
            _score_entries(context, store, sandbox, others, split, [MAIN], title=title)


def score_test(
    context: ScoringContext, store: Store, sandbox: Sandbox | None, entries: Entries
) -> None:
    """Score entries on the test problems, with the experts of each setting.

    Args:
        context: the loaded models.
        store: the store of the results.
        sandbox: the sandbox on the main process; None on the others.
        entries: what is scored.
    """
    for setting in context.settings:
        record_opening(store, entries, setting)
    _score_entries(context, store, sandbox, entries, TEST, list(context.settings), title="test")


def record_opening(
    store: Store, entries: Iterable[str], setting: str, others: Iterable[str] = ()
) -> None:
    """Record that the test is about to be opened, unless all entries are part of earlier openings.

    A store of an earlier version did not record openings; what it has tested counts as one.

    Args:
        store: the store of the results.
        entries: names of the entries.
        setting: name of the setting whose models are merged.
        others: names of the earlier bests.
    """
    earlier = store.select(TestOpening, setting=setting)
    if not earlier and (tested := [one.entry for one in store.summaries(TEST, setting)]):
        store.save(TestOpening(setting=setting, number=1, entries=tuple(tested)))
        earlier = store.select(TestOpening, setting=setting)
    known = {name for one in earlier for name in (*one.entries, *one.earlier_bests)}
    listed = {name for one in earlier for name in one.entries}
    new = tuple(name for name in entries if name not in listed)
    new_others = tuple(name for name in others if name not in known)
    if new or new_others:
        number = len(earlier) + 1
        store.save(
            TestOpening(setting=setting, number=number, entries=new, earlier_bests=new_others)
        )


def _score_entries(
    context: ScoringContext,
    store: Store,
    sandbox: Sandbox | None,
    entries: Entries,
    split: str,
    settings: list[str],
    *,
    title: str,
) -> None:
    """Score entries on a split with the experts of some settings, unless they have a score."""
    details = {name: entry.detail for name, entry in store.by_key(Entry).items()}
    tasks = [
        (name, setting)
        for setting in settings
        for name in entries
        if not store.is_complete(name, split, setting)
    ]
    if not tasks:
        return
    total = len(settings) * len(entries)
    with progress_bar(title, total, completed=total - len(tasks)) as advance:
        for name, setting in tasks:
            identity = entries[name]
            if identity is None:
                score_baseline(context, store, name, details[name] or None, split, setting)
            else:
                score_program(context, store, sandbox, identity, split, setting)
            advance()
