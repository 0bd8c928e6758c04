"""Construction of preference pairs from scored samples.

Percentages refer to the distinct scored programs of one iteration. The result is independent of the
order of the inputs. Subsampling is by hash, so the result is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdjax.search.config import SelectionConfig
from sdjax.search.ranking import rank_key
from sdjax.search.score_types import Pair, ScoredSample, StoredPair
from sdjax.search.store import Store


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen samples, best first, and rejected samples, worst first, with disjoint identities."""

    chosen: tuple[ScoredSample, ...]
    rejected: tuple[ScoredSample, ...]


def rank_samples(samples: Iterable[ScoredSample]) -> tuple[ScoredSample, ...]:
    """Return the first sample of each program, best first, with ties broken by identity.

    A duplicate has its original's identity, see `JudgedSample`.
    """
    first: dict[str, ScoredSample] = {}
    for sample in sorted(samples, key=lambda s: (s.iteration, s.number, s.identity, s.text)):
        first.setdefault(sample.identity, sample)
    return tuple(sorted(first.values(), key=lambda s: rank_key(s.score, s.identity)))


def quota(count: int, percent: float, limit: int) -> int:
    """Return `percent` percent of `count`, rounded and clipped to between 2 and `limit`."""
    return min(max(2, int(count * percent / 100 + 0.5)), limit)


def select(
    current: Iterable[ScoredSample],
    earlier: Sequence[Iterable[ScoredSample]],
    config: SelectionConfig,
) -> Selection:
    """Select the chosen and the rejected samples.

    With fewer than four programs, a side has fewer than two; with fewer than two programs, both
    sides are empty.

    Args:
        current: scored samples of this iteration.
        earlier: scored samples of each earlier iteration, whose elites are also chosen.
        config: percentages and thresholds. A program that changes the seed by less than
            `min_change` is never chosen, not even as an elite, but may be rejected.
    """
    ranking = rank_samples(current)
    if len(ranking) < 2:
        return Selection(chosen=(), rejected=())
    effective = [sample for sample in ranking if sample.change >= config.min_change]
    # Choose at most half of the programs, so that even the smallest runs reject some.
    chosen = effective[: quota(len(ranking), config.chosen_percent, len(ranking) // 2)]
    identities = {sample.identity for sample in chosen}
    for samples in earlier:
        effective = [
            sample for sample in rank_samples(samples) if sample.change >= config.min_change
        ]
        elites = effective[: config.elites]
        chosen += [elite for elite in elites if elite.identity not in identities]
        identities |= {elite.identity for elite in elites}
    rest = [sample for sample in reversed(ranking) if sample.identity not in identities]
    rejected = rest[: quota(len(ranking), config.rejected_percent, len(rest))]
    chosen.sort(key=lambda s: rank_key(s.score, s.identity))
    return Selection(chosen=tuple(chosen), rejected=tuple(rejected))


def make_pairs(selection: Selection, config: SelectionConfig, *, key: int) -> tuple[Pair, ...]:
    """Return up to `max_pairs` pairs whose scores differ, by at least `min_gap`.

    Pairs are sorted by chosen sample, best first, then by rejected sample, worst first. If there
    are too many, those with the smallest hashes of (key, chosen, rejected) are kept, which is
    equivalent to sampling without replacement.

    Args:
        selection: chosen and rejected samples.
        config: sets `min_gap` and `max_pairs`.
        key: seed of the subsampling.
    """
    pairs = [
        Pair(chosen=chosen, rejected=rejected)
        for chosen in selection.chosen
        for rejected in selection.rejected
        if chosen.identity != rejected.identity
        and chosen.score > rejected.score
        and chosen.score - rejected.score >= config.min_gap - 1e-9  # scores are ratios of counts
    ]
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return tuple(pairs)
    sampled = set(sorted(pairs, key=lambda pair: _hash(key, pair))[: config.max_pairs])
    return tuple(pair for pair in pairs if pair in sampled)


def preferences_of_run(folder: Path) -> list[dict[str, str]]:
    """Return all preference pairs of a run as rows with prompt, chosen and rejected.

    Duplicate rows are removed.

    Raises:
        UserError: the folder does not contain a run, or its database is damaged.
    """
    with Store.open(folder) as store:
        prompts, pairs = store.prompts(), store.select(StoredPair)
    rows = {
        (pair.chosen.prompt, pair.chosen.text, pair.rejected.text): {
            "prompt": prompts[pair.chosen.prompt],
            "chosen": pair.chosen.text,
            "rejected": pair.rejected.text,
        }
        for pair in pairs
    }
    return list(rows.values())


def _hash(key: int, pair: Pair) -> bytes:
    text = f"{key}|{pair.chosen.identity}|{pair.rejected.identity}"
    return hashlib.sha256(text.encode()).digest()
