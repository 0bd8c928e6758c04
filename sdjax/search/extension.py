"""Which keys of a run's config may change when the run is resumed, and why others may not.

A key may change if all earlier results are also results of the new config: the run then goes on as
if it had had the new value from the start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError
from sdjax.search.config import RunConfig
from sdjax.search.types import Change


@dataclass(frozen=True, kw_only=True)
class _Extension:
    """A key that may change: a condition on (old, new), and its description."""

    allowed: Callable[[Any, Any], bool]
    condition: str


_ANY = _Extension(allowed=lambda old, new: True, condition="")
_LARGER = _Extension(
    allowed=lambda old, new: new > old, condition="it can only grow, since results are kept"
)
_MORE_POINTS = _Extension(
    allowed=lambda old, new: (
        all(
            set(map(repr, values)) <= set(map(repr, new.get(method, {}).get(name, ())))
            for method, axes in old.items()
            for name, values in axes.items()
        )
        and all(new.get(method, {}).keys() == axes.keys() for method, axes in old.items())
    ),
    condition="values and methods can only be added, since results are kept",
)
_WAS_EMPTY = _Extension(
    allowed=lambda old, new: not old,
    condition="experts can only be added to a run without them, since results are kept",
)

# Sections of the config that are compared as a whole are keys here, too.
EXTENSIONS: dict[str, _Extension] = {
    "name": _ANY,
    "iterations": _LARGER,
    "generation.samples": _LARGER,
    "test.top_k": _LARGER,
    "baselines.paper": _MORE_POINTS,
    "baselines.fine": _MORE_POINTS,
    "transfer": _WAS_EMPTY,
    "sandbox.workers": _ANY,
    "sandbox.allow_missing": _ANY,
    "sandbox.apply_seconds": _ANY,
}

# Keys that change rounding only, as other devices do; changed with --accept-versions.
ENVIRONMENT = ("mesh",)

# Keys of models, which may have moved: their weights are compared, not their names.
MODELS = re.compile(r"seed|experts\.(\w+)\.model")

# Why the other keys, or all keys of a section, cannot change.
REASONS: dict[str, str] = {
    "seed": "all programs were applied to it",
    "experts": "all programs were scored on them",
    "scope": "all programs were scored on it",
    "task": "scores on other problems are not comparable",
    "evaluation": "scores of other answers are not comparable",
    "generator": "all iterations started from it",
    "generation": "earlier iterations were sampled with it",
    "selection": "earlier generators were trained on pairs that it chose",
    "training": "earlier generators were trained with it",
    "sandbox": "it decides which programs are admitted",
    "rng_seed": "all random numbers depend on it",
}


def config_changes(old: RunConfig, new: RunConfig, where: str) -> list[Change]:
    """Return the changed keys of a resumed run.

    Args:
        old: the run's config.
        new: the config to resume it with.
        where: the run, for error messages.

    Raises:
        UserError: a change that would make earlier results incomparable.
    """
    before, after = dict(_values(old)), dict(_values(new))
    changes = []
    for key in before.keys() | after.keys():
        old_value, new_value = before.get(key), after.get(key)
        if old_value == new_value:
            continue
        _check_change(key, old_value, new_value, where)
        changes.append(
            Change(kind="config", key=key, old=json.dumps(old_value), new=json.dumps(new_value))
        )
    return sorted(changes, key=lambda change: change.key)


def needs_acceptance(change: Change) -> bool:
    """Return whether a change can alter the numbers of a run without making them incomparable."""
    return change.kind != "config" or change.key.split(".")[0] in ENVIRONMENT


def check_samples(config: RunConfig, changes: Collection[Change], generated: int) -> None:
    """Raise UserError if more samples are requested but all iterations have theirs.

    Args:
        config: the new config.
        changes: the changes that led to it.
        generated: number of iterations whose samples are complete.
    """
    if generated >= config.iterations and any(c.key == "generation.samples" for c in changes):
        raise UserError(
            "generation.samples: every iteration has its samples; more samples apply to new "
            f"iterations, so also set iterations={config.iterations + 1}"
        )


def _check_change(key: str, old: Any, new: Any, where: str) -> None:
    top = key.split(".")[0]
    if top in ENVIRONMENT or MODELS.fullmatch(key):
        return
    extension = EXTENSIONS.get(key)
    if extension is not None and extension.allowed(old, new):
        return
    reason = REASONS[top] if extension is None else extension.condition
    raise _refusal(key, json.dumps(old), json.dumps(new), reason, where)


def check_moved_models(changes: Collection[Change], where: str) -> None:
    """Raise UserError if a model has another name and other weights, and is not just moved."""
    different = {change.key for change in changes if change.kind == "input"}
    for change in changes:
        match = MODELS.fullmatch(change.key) if change.kind == "config" else None
        if match is not None and (match[1] or "seed") in different:
            reason = f"it has other weights, and {REASONS[change.key.split('.')[0]]}"
            raise _refusal(change.key, change.old, change.new, reason, where)


def _refusal(key: str, old: str, new: str, reason: str, where: str) -> UserError:
    old, new = (text if len(text) <= 60 else f"{text[:59]}…" for text in (old, new))
    return UserError(
        f"{where}: contains a run with {key} = {old}, which cannot become {new}: {reason}; "
        "resume it without this change, or start a new run with another --out"
    )


def _values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield the keys with their values as JSON data; a key of `EXTENSIONS` is one value."""

    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value and key not in EXTENSIONS:
            for name, inner in value.items():
                yield from walk(f"{key}.{name}" if key else name, inner)
        else:
            yield key, value

    return walk("", json.loads(json.dumps(config.to_json())))
