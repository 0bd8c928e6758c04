"""Which base a program is applied to, and the identity that it has there.

Co-evolution replaces the base of a run, at first the seed, by a better merged model. What a program
gives depends on its base, so a program on another base than the seed is another program: its
identity, structure and fingerprint are hashes of its own and of the base. Everything that is keyed
by them, such as scores, duplicates and pairs, then belongs to one base. The sandbox judges a source
once, whatever the base.

A base is named by the entry whose merged model it is; None is the seed. That entry may itself be a
program on an earlier base, which makes a chain of programs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, TypeVar

from sdjax.search.score_types import Promotion
from sdjax.search.types import SEARCH, UNTRAINED, Program, StoredVerdict

Judged = TypeVar("Judged", Program, StoredVerdict)

_HASHES = ("identity", "structure", "fingerprint")


def on_base(record: Judged, base: str | None) -> Judged:
    """Return a program, or the verdict on it, as that of its application to a base.

    Args:
        record: a record of the program on the seed.
        base: entry of the base; None for the seed, on which the record stays as it is.
    """
    if base is None:
        return record
    hashes = {name: getattr(record, name) for name in _HASHES if hasattr(record, name)}
    changed: dict[str, Any] = {
        name: hash_on_base(one, base) for name, one in hashes.items() if one is not None
    }
    if isinstance(record, Program):
        return dataclasses.replace(record, base=base, **changed)
    return dataclasses.replace(record, **changed)


def hash_on_base(digest: str, base: str | None) -> str:
    """Return a program's hash on a base; on the seed, its own."""
    if base is None:
        return digest
    return hashlib.sha256(f"{digest} on {base}".encode()).hexdigest()[: len(digest)]


def promotions_of(promotions: Iterable[Promotion], purpose: str) -> list[Promotion]:
    """Return the decisions for a purpose; those after the first iteration count as untrained too.

    Args:
        promotions: all decisions of a run.
        purpose: "search", that of a control, or what a tuned control is.
    """
    own = [one for one in promotions if one.purpose == purpose]
    if purpose != UNTRAINED:
        return own
    first = [one for one in promotions if (one.purpose, one.iteration) == (SEARCH, 1)]
    # Its batches are numbered from 1, and follow the first iteration of the search.
    return [*(dataclasses.replace(one, iteration=0) for one in first), *own]


def base_of_iteration(promotions: Iterable[Promotion], purpose: str, iteration: int) -> str | None:
    """Return the entry of an iteration's base; None for the seed.

    Args:
        promotions: all decisions of a run.
        purpose: "search", or that of a control, whose batches are its iterations.
        iteration: number of the iteration.
    """
    earlier = [
        one
        for one in promotions_of(promotions, purpose)
        if one.is_base and one.iteration < iteration
    ]
    return max(earlier, key=lambda one: one.iteration).entry if earlier else None


def iterations_on_base(promotions: Iterable[Promotion], iteration: int) -> list[int]:
    """Return the iterations of the search before this one that had the same base.

    Scores on different bases are not comparable as worths of programs.

    Args:
        promotions: all decisions of a run.
        iteration: number of the iteration.
    """
    stored = list(promotions)
    base = base_of_iteration(stored, SEARCH, iteration)
    return [n for n in range(1, iteration) if base_of_iteration(stored, SEARCH, n) == base]


def generator_base(promotions: Iterable[Promotion], iteration: int) -> str | None:
    """Return the entry whose merged model the generator of an iteration starts from.

    Args:
        promotions: all decisions of a run.
        iteration: number of the iteration of the search.

    Returns:
        None for the seed.
    """
    earlier = [
        one
        for one in promotions_of(promotions, SEARCH)
        if one.is_generator and one.iteration < iteration
    ]
    return max(earlier, key=lambda one: one.iteration).entry if earlier else None
