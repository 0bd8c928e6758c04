"""Chains of entries: each is applied to the merged model of the one before, the first to the seed.

Without co-evolution, every chain has one entry.
"""

from __future__ import annotations

from sdjax.core.errors import UserError
from sdjax.search.entry_names import display_name
from sdjax.search.store import Store
from sdjax.search.types import Entry


def base_of_entry(store: Store, entry: Entry) -> str | None:
    """Return the entry of the base that an entry is applied to; None for the seed."""
    if entry.kind == "program":
        return store.program(entry.identity or "").base
    base = entry.detail.get("base")
    return base if isinstance(base, str) else None


def chain_of_entry(store: Store, entry: Entry) -> list[Entry]:
    """Return the entries that are applied one after another, from the seed to this entry.

    Raises:
        UserError: the store lacks a program, or was changed so that a chain has no end.
    """
    entries, chain = store.by_key(Entry), [entry]
    while (base := base_of_entry(store, chain[0])) is not None:
        if base not in entries or len(chain) > len(entries):
            raise UserError(
                f"{store.folder}: the base of {display_name(chain[0].name)} is missing; the run "
                "was changed: restore it from a backup"
            )
        chain.insert(0, entries[base])
    return chain
