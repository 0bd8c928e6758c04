"""Names of entries for people."""

from __future__ import annotations


def display_name(entry: str, tuned_from: str = "") -> str:
    """Return a readable name of an entry, such as "program 3fa9c1d0" or "ties(density=0.4)".

    Args:
        entry: name of the entry.
        tuned_from: identity of the program whose numbers were tuned, if the entry is a result of
            that: "program 3fa9c1d0 (tuned 16269aeb)".
    """
    kind, _, rest = entry.partition(":")
    if kind == "program":
        origin = f" (tuned {short_identity(tuned_from)})" if tuned_from else ""
        return f"program {short_identity(rest)}{origin}"
    if kind == "ablation":
        return rest.partition(":")[2]
    return rest or kind.replace("_", " ")


def short_identity(identity: str) -> str:
    """Return the part of a program's identity that people are shown."""
    return identity[:8]
