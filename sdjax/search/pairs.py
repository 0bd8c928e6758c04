"""Construction of preference pairs from samples with scores and faults.

Percentages refer to the distinct scored programs of one group: the samples of an iteration or of
all, or those of one prompt. The result is independent of the order of the inputs. Subsampling is by
hash, so the result is the same on every machine.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdjax.search.ranking import rank_key
from sdjax.search.score_types import Pair, ScoredSample, StoredPair
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.store import Store
from sdjax.search.types import storable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen samples, best first, and rejected samples: those with a fault, then the worst first.

    No program is on both sides, except as a duplicate of itself.
    """

    chosen: tuple[ScoredSample, ...]
    rejected: tuple[ScoredSample, ...]


def rank_samples(samples: Iterable[ScoredSample]) -> tuple[ScoredSample, ...]:
    """Return the first sample of each program without a fault, best first.

    Ties are broken by identity. A duplicate has its original's identity, see `JudgedSample`.
    """
    first: dict[str, ScoredSample] = {}
    for sample in sorted(samples, key=_sampling_order):
        if sample.fault is None:
            first.setdefault(sample.identity, sample)
    return tuple(sorted(first.values(), key=lambda s: rank_key(s.score, s.identity)))


def faulty_samples(samples: Iterable[ScoredSample]) -> tuple[ScoredSample, ...]:
    """Return the samples with a fault, each text of a prompt once, in sampling order."""
    first: dict[tuple[str, str], ScoredSample] = {}
    for sample in sorted(samples, key=_sampling_order):
        if sample.fault is not None:
            first.setdefault((sample.prompt, sample.text), sample)
    return tuple(first.values())


def prompt_groups(
    current: Iterable[ScoredSample], earlier: Sequence[Iterable[ScoredSample]]
) -> list[tuple[list[ScoredSample], list[list[ScoredSample]]]]:
    """Return the current and the earlier samples of each prompt that has current ones."""
    groups: dict[str, list[ScoredSample]] = {}
    for sample in current:
        groups.setdefault(sample.prompt, []).append(sample)
    before = [list(samples) for samples in earlier]
    return [
        (groups[prompt], [[s for s in samples if s.prompt == prompt] for samples in before])
        for prompt in sorted(groups)
    ]


def quota(count: int, percent: float, limit: int) -> int:
    """Return `percent` percent of `count`, rounded and clipped to between 2 and `limit`."""
    return min(max(2, int(count * percent / 100 + 0.5)), limit)


def score_percentile(samples: Iterable[ScoredSample], percentile: float) -> float:
    """Return a percentile of the scores of the distinct programs, interpolated linearly.

    Percentile 0, and any percentile of no programs, is minus infinity.
    """
    scores = [sample.score for sample in rank_samples(samples)]
    return float(np.percentile(scores, percentile)) if scores and percentile > 0 else -math.inf


def select(
    current: Iterable[ScoredSample],
    earlier: Sequence[Iterable[ScoredSample]],
    config: SelectionConfig,
    *,
    min_score: float = -math.inf,
) -> Selection:
    """Select the chosen and the rejected samples of a group.

    All samples with a fault are rejected, except for texts that are also chosen. With fewer than
    four programs, a side has fewer than two; with fewer than two programs, or one and no faults,
    both sides are empty.

    Args:
        current: samples of the group.
        earlier: samples of each earlier iteration, whose elites are also chosen.
        config: percentages and thresholds. A program that changes the seed by less than
            `min_change` is never chosen, not even as an elite, but may be rejected.
        min_score: score that a chosen program must reach.
    """
    current = list(current)
    ranking, faulty = rank_samples(current), faulty_samples(current)
    # Choose at most half of the programs, so that even the smallest runs reject some.
    limit = max(len(ranking) // 2, 1 if ranking and faulty else 0)
    if limit == 0:
        return Selection(chosen=(), rejected=())
    usable = _usable(ranking, config, min_score)
    chosen = usable[: quota(len(ranking), config.chosen_percent, limit)]
    identities = {sample.identity for sample in chosen}
    for samples in earlier:
        elites = _usable(rank_samples(samples), config, min_score)[: config.elites]
        chosen += [elite for elite in elites if elite.identity not in identities]
        identities |= {elite.identity for elite in elites}
    chosen.sort(key=lambda s: rank_key(s.score, s.identity))
    rest = [sample for sample in reversed(ranking) if sample.identity not in identities]
    rejected = rest[: quota(len(ranking), config.rejected_percent, len(rest))]
    texts = {(sample.prompt, sample.text) for sample in chosen}
    faults = [sample for sample in faulty if (sample.prompt, sample.text) not in texts]
    return Selection(chosen=tuple(chosen), rejected=(*faults, *rejected))


def all_pairs(selection: Selection, config: SelectionConfig) -> list[Pair]:
    """Return the pairs of a selection, by chosen and then by rejected sample.

    The two programs of a pair differ. Their scores differ by at least `min_gap`, unless the
    rejected sample has a fault.
    """
    return [
        Pair(chosen=chosen, rejected=rejected)
        for chosen in selection.chosen
        for rejected in selection.rejected
        if chosen.identity != rejected.identity
        and (rejected.fault is not None or _is_better(chosen, rejected, config.min_gap))
    ]


def subsample(pairs: Sequence[Pair], config: SelectionConfig, *, key: int) -> tuple[Pair, ...]:
    """Return the pairs that the maximum numbers of pairs leave, in their order.

    Pairs are taken by ascending hash of (key, chosen, rejected) as long as no maximum is exceeded,
    which is equivalent to sampling without replacement if there is only `max_pairs`.

    Args:
        pairs: distinct pairs.
        config: sets `max_pairs`, `max_pairs_per_chosen` and `max_pairs_per_rejected`.
        key: seed of the subsampling.
    """
    limits = {
        "chosen": config.max_pairs_per_chosen or len(pairs),
        "rejected": config.max_pairs_per_rejected or len(pairs),
    }
    total = len(pairs) if config.max_pairs is None else min(config.max_pairs, len(pairs))
    if total == len(pairs) and set(limits.values()) <= {len(pairs)}:
        return tuple(pairs)
    counts: Counter[tuple[str, str]] = Counter()
    taken: set[int] = set()
    for index in sorted(range(len(pairs)), key=lambda index: _hash(key, pairs[index])):
        sides = [(side, _name(getattr(pairs[index], side))) for side in limits]
        if len(taken) < total and all(counts[side] < limits[side[0]] for side in sides):
            taken.add(index)
            counts.update(sides)
    return tuple(pair for index, pair in enumerate(pairs) if index in taken)


def make_pairs(
    current: Iterable[ScoredSample],
    earlier: Sequence[Iterable[ScoredSample]],
    config: SelectionConfig,
    *,
    key: int,
) -> tuple[Pair, ...]:
    """Return the preference pairs of an iteration.

    Args:
        current: samples of the iteration or, with `iterations: all`, of all so far.
        earlier: samples of each earlier iteration, for the elites.
        config: the rules.
        key: seed of the subsampling.
    """
    current = list(current)
    min_score = score_percentile(current, config.min_percentile)
    groups = prompt_groups(current, earlier) if config.within_prompt else [(current, earlier)]
    pairs = [
        pair
        for own, before in groups
        for pair in all_pairs(select(own, before, config, min_score=min_score), config)
    ]
    return subsample(pairs, config, key=key)


def preferences_of_run(folder: Path) -> list[dict[str, str]]:
    """Return the preference pairs of a run as rows with prompt, chosen and rejected.

    Duplicate rows are removed. A row has one prompt, so pairs of samples of different prompts are
    left out, and reported.

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
        if pair.chosen.prompt == pair.rejected.prompt
    }
    across = sum(pair.chosen.prompt != pair.rejected.prompt for pair in pairs)
    if across:
        logger.warning(
            "%s: %d of %d pairs are left out, since their texts answer different prompts",
            folder,
            across,
            len(pairs),
        )
    return list(rows.values())


def _sampling_order(sample: ScoredSample) -> tuple[int, int, str, str]:
    return (sample.iteration, sample.number, sample.identity, sample.text)


def _usable(
    ranking: Iterable[ScoredSample], config: SelectionConfig, min_score: float
) -> list[ScoredSample]:
    return [s for s in ranking if s.change >= config.min_change and s.score >= min_score]


def _is_better(chosen: ScoredSample, rejected: ScoredSample, min_gap: float) -> bool:
    gap = chosen.score - rejected.score
    return gap > 0 and gap >= min_gap - 1e-9  # scores are ratios of counts


def _name(sample: ScoredSample) -> str:
    """Return the identity of a scored program, and the text of a sample with a fault."""
    return sample.identity if sample.fault is None else sample.text


def _hash(key: int, pair: Pair) -> bytes:
    text = f"{key}|{_name(pair.chosen)}|{_name(pair.rejected)}"
    return hashlib.sha256(storable(text).encode()).digest()
