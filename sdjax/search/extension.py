"""Check of the changes to a run's config when the run is resumed.

A key may change if all earlier results are also results of the new config. The run then resumes as
if it had had the new value from the start, except that iterations whose samples are complete keep
their number of samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError
from sdjax.core.versions import UNKNOWN
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
        old is None
        or (
            new is not None
            and new.keys() == old.keys()
            and all(set(map(repr, old[name])) <= set(map(repr, new[name])) for name in old)
        )
    ),
    condition="values and methods can only be added, since results are kept",
)
_MORE_TOKENS = _Extension(
    allowed=lambda old, new: old is not None and (new is None or new > old),
    condition="it can only grow, since answers are kept",
)
_MOVED = _Extension(
    allowed=lambda old, new: old is not None and new is not None,
    condition="generators cannot be added or removed, since earlier iterations used them",
)
_MORE_CONTROLS = _Extension(
    allowed=lambda old, new: (
        old is None
        or (
            new is not None
            and set(old["tuned"]) <= set(new["tuned"])
            and all(old[key] <= new[key] for key in ("random", "untrained"))
            and old["max_evaluations"] == new["max_evaluations"]
        )
    ),
    condition="controls can only be added, since results are kept",
)
_NEW_EXPERTS = _Extension(
    allowed=lambda old, new: not old,
    condition="experts can only be added to a run without them, since results are kept",
)

# A key is one value here, even if it is a section; "*" is any name.
EXTENSIONS: dict[str, _Extension] = {
    "name": _ANY,
    "iterations": _LARGER,
    "generation.samples": _LARGER,
    "generators.*.model": _MOVED,
    "generators.*.programs": _MOVED,
    "generators.*.endpoint.base_url": _ANY,
    "generators.*.endpoint.api_key_env": _ANY,
    "generators.*.endpoint.concurrency": _ANY,
    "generators.*.endpoint.timeout": _ANY,
    "generators.*.endpoint.retries": _ANY,
    "generators.*.endpoint.max_tokens_total": _MORE_TOKENS,
    "generators.*.endpoint.replay": _ANY,
    "test.top_k": _LARGER,
    "test.ablations": _ANY,
    "training.after_last": _ANY,
    "baselines.paper.*": _MORE_POINTS,
    "baselines.fine.*": _MORE_POINTS,
    "controls": _MORE_CONTROLS,
    "transfer": _NEW_EXPERTS,
    "limits.max_hours": _ANY,
    "limits.max_programs": _ANY,
    "sandbox.workers": _ANY,
    "sandbox.allow_missing": _ANY,
    "sandbox.apply_seconds": _ANY,
}

# Keys that change rounding only, as other devices do; changed with --accept-versions.
ENVIRONMENT = ("mesh",)

# Keys of models, which may have moved: their weights are compared, not their names.
MODELS = re.compile(r"seed|generator|(?:experts|(transfer))\.(\w+)\.model")

# Why the other keys, or all keys of a section, cannot change.
REASONS: dict[str, str] = {
    "seed": "all programs were applied to it",
    "experts": "all programs were scored on them",
    "experts.*.description": "the prompt depends on it",
    "transfer": "experts can only be added to a run without them, since results are kept",
    "scope": "all programs were scored on it",
    "task": "scores on other problems are not comparable",
    "evaluation": "scores of other answers are not comparable",
    "generator": "all iterations started from it",
    "generation": "earlier iterations were sampled with it",
    "generators": "earlier iterations were sampled with them",
    "score": "all programs were scored that way",
    "race": "it decided which problems the programs answered",
    "tuning": "results of its searches are kept",
    "coevolution": "it decided which bases and generators the iterations had",
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
    # New transfer experts are one change; those of a run that has some are compared in detail.
    whole = set(EXTENSIONS) - ({"transfer"} if old.transfer and new.transfer else set())
    before, after = dict(_values(old, whole)), dict(_values(new, whole))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        old_value, new_value = before.get(key), after.get(key)
        if old_value == new_value:
            continue
        _check_change(key, old_value, new_value, where)
        changes.append(
            Change(kind="config", key=key, old=json.dumps(old_value), new=json.dumps(new_value))
        )
    return changes


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
    if key.split(".")[0] in ENVIRONMENT:
        return
    if MODELS.fullmatch(key) and old is not None and new is not None:
        return
    extension = EXTENSIONS.get(key) or EXTENSIONS.get(_pattern(key))
    if extension is not None and extension.allowed(old, new):
        return
    reason = _reason(key) if extension is None else extension.condition
    raise _refusal(key, json.dumps(old), json.dumps(new), reason, where)


def _pattern(key: str) -> str:
    """Return a key with a name replaced by "*", such as "experts.*.model"."""
    parts = key.split(".")
    index = 2 if parts[0] == "baselines" else 1
    return ".".join("*" if number == index else part for number, part in enumerate(parts))


def _reason(key: str) -> str:
    return REASONS.get(_pattern(key)) or REASONS[key.split(".")[0]]


def check_moved_models(changes: Collection[Change], where: str) -> None:
    """Raise UserError if a model has another name and other weights, and is not just moved.

    Weights whose fingerprint was not recorded count as the same, since other changes of the inputs
    need to be accepted.
    """
    different = {
        change.key for change in changes if change.kind == "input" and change.old != UNKNOWN
    }
    for change in changes:
        match = MODELS.fullmatch(change.key) if change.kind == "config" else None
        if match is None:
            continue
        transfer, slot = match.groups()
        name = f"transfer {slot}" if transfer else slot or change.key
        if name in different:
            reason = f"it has other weights, and {_reason(change.key)}"
            raise _refusal(change.key, change.old, change.new, reason, where)


def _refusal(key: str, old: str, new: str, reason: str, where: str) -> UserError:
    old, new = (text if len(text) <= 60 else f"{text[:59]}…" for text in (old, new))
    return UserError(
        f"{where}: contains a run with {key} = {old}, which cannot become {new}: {reason}; "
        "resume it without this change, or start a new run with another --out"
    )


def _values(config: RunConfig, whole: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the keys with their values as JSON data; a key in `whole` is one value."""

    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and not {key, _pattern(key)} & set(whole):
            for name, inner in value.items():
                yield from walk(f"{key}.{name}" if key else name, inner)
        else:
            yield key, value

    return walk("", json.loads(json.dumps(config.to_json())))
