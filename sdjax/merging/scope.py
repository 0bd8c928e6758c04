"""Which tensors a merge touches."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from sdjax.core.errors import UserError

Scope = str | tuple[str, ...] | list[str]

_NAMED = {"mlp": ("*/mlp/*",), "attention": ("*/attn/*",), "all": ("*",)}


def select_paths(paths: Iterable[str], scope: Scope) -> tuple[str, ...]:
    """The paths in scope, sorted.

    scope: "mlp" (what a search merges, as in the paper), "attention", "all", or one or more glob
        patterns over tensor paths (``layers/0/*``, ``*/mlp/down_proj``; ``*`` also crosses ``/``).
    Raises UserError for a pattern that matches nothing: a silent no-op would score as the seed.
    """
    if not isinstance(scope, str | tuple | list) or not all(isinstance(p, str) for p in scope):
        raise UserError(f"scope must be mlp, attention, all or glob patterns, not {scope!r:.60}")
    known = sorted(paths)
    patterns = _NAMED.get(scope, (scope,)) if isinstance(scope, str) else tuple(scope)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(known, pattern)
        if not matched:
            example = f"such as {known[len(known) // 2]!r}" if known else "and there are none"
            raise UserError(
                f"scope {pattern!r} matches no tensor; use mlp, attention, all or a glob over "
                f"paths {example}"
            )
        chosen.update(matched)
    if not chosen:
        raise UserError("scope is empty; use mlp, attention, all or glob patterns")
    return tuple(sorted(chosen))
