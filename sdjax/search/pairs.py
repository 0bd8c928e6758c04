"""From scored programs to preference pairs (DESIGN.md, decision 10).

The percentages are of the distinct scored programs of one iteration. Nothing here depends on the
order of its inputs, and the sampling is by hash, so it is the same on every machine and version.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One program with its score.

    identity: of the program; prompt: hash of the prompt it was sampled from, which an elite of an
    earlier iteration keeps; text: the completion to train on; score: on the development set;
    change: norm of the merged task vector over the experts' mean norm; number: of its first sample.
    """

    identity: str
    prompt: str
    text: str
    score: float
    change: float
    iteration: int
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How winners and losers are chosen; the percentages are of distinct scored programs."""

    winners_percent: float = 3.0
    losers_percent: float = 10.0
    elites: int = 3
    min_gap: float = 0.0
    min_change: float = 1e-3
    max_pairs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Winners (elites among them, best first) and losers (worst first), disjoint by identity."""

    winners: tuple[Scored, ...]
    losers: tuple[Scored, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A program to be preferred and one to be preferred less."""

    winner: Scored
    loser: Scored


def rank(programs: Iterable[Scored]) -> tuple[Scored, ...]:
    """Distinct programs, best first; ties break by identity.

    Of several samples with one identity, or one text, the first stands for all of them.
    """
    seen: set[str] = set()
    texts: set[tuple[str, str]] = set()
    distinct = []
    for program in sorted(programs, key=lambda p: (p.iteration, p.number, p.identity, p.text)):
        if program.identity in seen or (program.prompt, program.text) in texts:
            continue
        seen.add(program.identity)
        texts.add((program.prompt, program.text))
        distinct.append(program)
    return tuple(sorted(distinct, key=lambda p: (-p.score, p.identity)))


def quota(count: int, percent: float, limit: int) -> int:
    """How many `percent` of `count` programs are: rounded, at least two, at most `limit`."""
    return min(max(2, int(count * percent / 100 + 0.5)), limit)


def select(
    current: Iterable[Scored],
    earlier: Sequence[Iterable[Scored]],
    settings: PairSettings,
) -> Selection:
    """Chooses winners and losers.

    current: the scored programs of this iteration; earlier: those of each earlier iteration, of
    which the `elites` best join the winners. A program that changes the seed by less than
    `min_change` is passed over as a winner and as an elite, and may be a loser. With fewer than
    four programs there are fewer than two of a side; with fewer than two, nobody to choose.
    """
    ranked = rank(current)
    if len(ranked) < 2:
        return Selection(winners=(), losers=())
    able = [program for program in ranked if program.change >= settings.min_change]
    # Half of the programs at most win, so that the least runs still have losers.
    winners = able[: quota(len(ranked), settings.winners_percent, len(ranked) // 2)]
    chosen = {program.identity for program in winners}
    for programs in earlier:
        able = [program for program in rank(programs) if program.change >= settings.min_change]
        elites = able[: settings.elites]
        winners += [elite for elite in elites if elite.identity not in chosen]
        chosen |= {elite.identity for elite in elites}
    rest = [program for program in reversed(ranked) if program.identity not in chosen]
    losers = rest[: quota(len(ranked), settings.losers_percent, len(rest))]
    winners.sort(key=lambda p: (-p.score, p.identity))
    return Selection(winners=tuple(winners), losers=tuple(losers))


def make_pairs(selection: Selection, settings: PairSettings, *, key: int) -> tuple[Pair, ...]:
    """All winners × losers that differ by `min_gap` and at all, at most `max_pairs` of them.

    Best winner first, then worst loser. The cap keeps the pairs with the smallest hashes of
    (key, winner, loser): a sample without replacement that needs no generator state.
    """
    pairs = [
        Pair(winner=winner, loser=loser)
        for winner in selection.winners
        for loser in selection.losers
        if winner.identity != loser.identity
        and winner.text != loser.text
        and winner.score > loser.score
        and winner.score - loser.score >= settings.min_gap - 1e-9  # scores are counts over n
    ]
    if settings.max_pairs is None or len(pairs) <= settings.max_pairs:
        return tuple(pairs)
    drawn = sorted(pairs, key=lambda pair: _draw(key, pair))[: settings.max_pairs]
    kept = {(pair.winner.identity, pair.loser.identity) for pair in drawn}
    return tuple(p for p in pairs if (p.winner.identity, p.loser.identity) in kept)


def _draw(key: int, pair: Pair) -> bytes:
    text = f"{key}|{pair.winner.identity}|{pair.loser.identity}"
    return hashlib.sha256(text.encode()).digest()
