"""Selection of the tensors that a merge changes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

from sdjax.core.errors import UserError, did_you_mean
from sdjax.models.tensor_names import TensorName, name_tensors

Scope = str | tuple[str, ...] | list[str]

# Names of the modules, in the families of sdjax and in others.
_MODULES = {
    "mlp": frozenset({"mlp", "feed_forward", "ffn"}),
    "attention": frozenset({"attn", "self_attn", "attention", "self_attention"}),
}


def select_paths(paths: Iterable[str], scope: Scope) -> tuple[str, ...]:
    """Return the paths in scope, sorted.

    Args:
        paths: tensor paths of a model, in any spelling.
        scope: "all", "mlp", "attention", or one or more glob patterns over tensor paths
            (`layers/0/*`, `*/mlp/down_proj`, `model.layers.0.*`; `*` matches any characters). A
            pattern may use either spelling, sdjax's or Hugging Face's.

    Raises:
        UserError: a pattern matches nothing; a merge that changes nothing would score the same as
            the seed.

    Examples:
        >>> select_paths(["lm_head.weight", "model.layers.0.mlp.up_proj.weight"], "layers/*")
        ('model.layers.0.mlp.up_proj.weight',)
    """
    if not isinstance(scope, str | tuple | list) or not all(isinstance(p, str) for p in scope):
        raise UserError(f"scope must be all, mlp, attention or glob patterns, not {scope!r:.60}")
    names = name_tensors(paths)
    patterns = (scope,) if isinstance(scope, str) else tuple(scope)
    if not patterns:
        raise UserError("scope is empty; use all, mlp, attention or glob patterns")
    selected: set[str] = set()
    for pattern in patterns:
        matches = _matcher(pattern)
        found = {path for path, name in names.items() if matches(path, name)}
        if not found:
            available = sorted(names)
            example = (
                f"such as {available[len(available) // 2]!r}" if available else "(there are none)"
            )
            advice = f"use all, mlp, attention or a glob pattern over paths {example}"
            hint = did_you_mean(pattern, ("all", *_MODULES), advice)
            raise UserError(f"scope {pattern!r} matches no tensor; {hint}")
        selected |= found
    return tuple(sorted(selected))


def _matcher(pattern: str) -> Callable[[str, TensorName], bool]:
    """Return whether a tensor, by its path and its name, is in a scope or matches a pattern."""
    if pattern == "all":
        return lambda path, name: True
    if pattern in _MODULES:
        modules = _MODULES[pattern]
        return lambda path, name: not modules.isdisjoint(name.path.split("/")[:-1])
    return lambda path, name: any(
        fnmatch.fnmatchcase(spelling, pattern) for spelling in (path, *name.spellings)
    )
