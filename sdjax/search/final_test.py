"""The final evaluation on the test problems, of a run and of a transfer."""

from __future__ import annotations

from collections.abc import Mapping

from sdjax.core.progress import progress_bar
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.baselines import score_baseline
from sdjax.search.context import ScoringContext
from sdjax.search.scoring import score_program
from sdjax.search.store import Store
from sdjax.search.types import TEST, Entry


def score_test(
    context: ScoringContext,
    store: Store,
    sandbox: Sandbox | None,
    entries: Mapping[str, str | None],
) -> None:
    """Score entries on the test problems, with the experts of each setting.

    Args:
        context: the loaded models.
        store: the store of the results.
        sandbox: the sandbox on the main process; None on the others.
        entries: the identity of each program, and None for each baseline, by name of the entry.
    """
    details = {name: entry.detail for name, entry in store.by_key(Entry).items()}
    tasks = [
        (name, setting)
        for setting in context.settings
        for name in entries
        if not store.is_complete(name, TEST, setting)
    ]
    total = len(context.settings) * len(entries)
    with progress_bar("test", total, completed=total - len(tasks)) as advance:
        for name, setting in tasks:
            identity = entries[name]
            if identity is None:
                score_baseline(context, store, name, details[name] or None, TEST, setting)
            else:
                score_program(context, store, sandbox, identity, TEST, setting)
            advance()
