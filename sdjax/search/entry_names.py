"""Names of entries for people."""

from __future__ import annotations


def display_name(entry: str) -> str:
    """Return a readable name of an entry, such as "program 3fa9c1d0" or "ties(density=0.4)"."""
    kind, _, rest = entry.partition(":")
    if kind == "program":
        return f"program {rest[:8]}"
    if kind == "ablation":
        return rest.partition(":")[2]
    return rest or kind.replace("_", " ")
