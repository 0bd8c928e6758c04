"""Selection of the tensors that a merge changes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from sdjax.core.errors import UserError

Scope = str | tuple[str, ...] | list[str]

_PATTERNS = {"mlp": ("*/mlp/*",), "attention": ("*/attn/*",), "all": ("*",)}


def select_paths(paths: Iterable[str], scope: Scope) -> tuple[str, ...]:
    """Return the paths in scope, sorted.

    Args:
        paths: tensor paths of a model.
        scope: "mlp" (the default of a search, as in the paper), "attention", "all", or one or more
            glob patterns over tensor paths (`layers/0/*`, `*/mlp/down_proj`; `*` also matches `/`).

    Raises:
        UserError: a pattern matches nothing; a merge that changes nothing would score the same as
            the seed.
    """
    if not isinstance(scope, str | tuple | list) or not all(isinstance(p, str) for p in scope):
        raise UserError(f"scope must be mlp, attention, all or glob patterns, not {scope!r:.60}")
    available = sorted(paths)
    patterns = _PATTERNS.get(scope, (scope,)) if isinstance(scope, str) else tuple(scope)
    selected: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(available, pattern)
        if not matches:
            example = (
                f"such as {available[len(available) // 2]!r}" if available else "(there are none)"
            )
            raise UserError(
                f"scope {pattern!r} matches no tensor; use mlp, attention, all or a glob pattern "
                f"over paths {example}"
            )
        selected.update(matches)
    if not selected:
        raise UserError("scope is empty; use mlp, attention, all or glob patterns")
    return tuple(sorted(selected))
