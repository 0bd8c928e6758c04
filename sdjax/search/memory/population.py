"""The population: the scored programs of earlier iterations, and the samples that wrote them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sdjax.search.ranking import rank_key

# Edges between the sizes of change that the archive tells apart; see `Member.change`.
CHANGE_EDGES = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A scored program.

    Attributes:
        identity: its identity.
        structure: hash of the program without the constants that can be tuned.
        source: its source code.
        score: its accuracy on the development problems.
        change: norm of its merged task vector over the mean norm of the experts'.
        families: families of its operations.
    """

    identity: str
    structure: str
    source: str
    score: float
    change: float
    families: tuple[str, ...]

    @property
    def cell(self) -> tuple[frozenset[str], int]:
        """The cell of the archive by behavior: families of operations, and band of the change."""
        return frozenset(self.families), bisect.bisect(CHANGE_EDGES, self.change)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A sample of an earlier iteration.

    Attributes:
        round: its iteration, counted over all iterations of its purpose.
        group: number of its prompt within the round.
        parents: identities of the programs in the prompt.
        identity: identity of the member that it wrote; None if it wrote none.
    """

    round: int
    group: int
    parents: tuple[str, ...]
    identity: str | None


@dataclass(frozen=True, kw_only=True)
class Population:
    """What earlier iterations have found.

    Attributes:
        members: the scored programs, best first; ties by identity.
        trials: the samples of earlier iterations, in sampling order.
    """

    members: tuple[Member, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, members: Iterable[Member], trials: Iterable[Trial]) -> Population:
        """Return the population of members and trials in any order."""
        return cls(
            members=tuple(sorted(members, key=lambda one: rank_key(one.score, one.identity))),
            trials=tuple(
                sorted(trials, key=lambda one: (one.round, one.group, one.identity or ""))
            ),
        )

    @cached_property
    def ancestors(self) -> Mapping[str, frozenset[str]]:
        """The parents of each program that was written from others, their parents, and so on.

        The parents are those of its first sample: a later sample that repeats a program does not
        make it a descendant.
        """
        found: dict[str, frozenset[str]] = {}
        for trial in self.trials:
            if trial.identity is not None and trial.identity not in found:
                above = (found.get(parent, frozenset()) for parent in trial.parents)
                found[trial.identity] = frozenset(trial.parents).union(*above) - {trial.identity}
        return found


def one_per(
    members: Sequence[Member], key: Callable[[Member], Hashable], at_least: int
) -> list[Member]:
    """Return the best member of each group, best first.

    Args:
        members: the members, best first.
        key: function that returns the group of a member.
        at_least: if there are fewer groups, the best of the others follow up to this number.
    """
    best: dict[Hashable, Member] = {}
    for member in members:
        best.setdefault(key(member), member)
    chosen = list(best.values())
    names = {member.identity for member in chosen}
    others = [member for member in members if member.identity not in names]
    return chosen + others[: max(0, at_least - len(chosen))]
