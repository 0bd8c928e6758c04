"""Policies that draw the parents of prompts from a population.

Each is a pure function of the population and the run's random key: the order in which samples were
stored or are asked for does not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import numpy as np

from sdjax.search.memory.population import Member, Population, one_per
from sdjax.search.memory_config import MemoryConfig


def draw_parents(
    config: MemoryConfig, population: Population, groups: int, key_data: Sequence[int]
) -> list[tuple[Member, ...]]:
    """Return the parents of the first prompts of an iteration, the best one last.

    The parents of a prompt have different structures, as far as there are enough.

    Args:
        config: the policy and its parameters.
        population: what earlier iterations have found.
        groups: number of prompts.
        key_data: words of the random key of the iteration.
    """
    if config.parents == "puct":
        drawn = puct_parents(config, population, groups)
    else:
        pools = [_eligible(config, population.members)]
        if config.parents == "islands":
            pools = [_eligible(config, members) for members in island_members(config, population)]
        drawn = [
            draw_top(pools[group % len(pools)], config.programs, config.top, rng)
            for group, rng in enumerate(generators(key_data, groups))
        ]
    return [tuple(reversed(population_order(population, parents))) for parents in drawn]


def generators(key_data: Sequence[int], groups: int) -> Iterator[np.random.Generator]:
    """Yield an independent random generator for each prompt."""
    return (np.random.default_rng([*key_data, group]) for group in range(groups))


def population_order(population: Population, parents: Sequence[Member]) -> list[Member]:
    """Return members best first."""
    names = {member.identity for member in parents}
    return [member for member in population.members if member.identity in names]


def draw_top(
    members: Sequence[Member], count: int, size: int, rng: np.random.Generator
) -> list[Member]:
    """Draw members without replacement; the probability falls linearly with the rank.

    Args:
        members: the members, best first.
        count: number to draw; all of them if there are fewer.
        size: number of best members to draw from.
        rng: random generator.
    """
    best = members[:size]
    if not best:
        return []
    weights = np.arange(len(best), 0, -1.0)
    chosen = rng.choice(
        len(best), size=min(count, len(best)), replace=False, p=weights / weights.sum()
    )
    return [best[index] for index in chosen]


def island_members(config: MemoryConfig, population: Population) -> list[list[Member]]:
    """Return the members of each island, best first.

    Prompt number n belongs to island n modulo the number of islands, and a program to the islands
    of the samples that wrote it. After every `migration` iterations, the best program of each
    island joins the next island as well. Islands are those of FunSearch (Romera-Paredes et al.,
    Nature 625, 2024) and of EvoTune (arXiv 2504.05108), which start weak islands again instead.
    """
    members = {member.identity: member for member in population.members}
    order = {identity: rank for rank, identity in enumerate(members)}
    islands: list[set[str]] = [set() for _ in range(config.islands)]
    rounds = sorted({trial.round for trial in population.trials})
    for number in rounds:
        for trial in population.trials:
            if trial.round == number and trial.identity in members:
                islands[trial.group % config.islands].add(trial.identity)
        if number % config.migration == 0:
            best = [min(island, key=order.__getitem__, default=None) for island in islands]
            for index, identity in enumerate(best):
                if identity is not None:
                    islands[(index + 1) % config.islands].add(identity)
    return [[members[name] for name in sorted(one, key=order.__getitem__)] for one in islands]


def puct_parents(config: MemoryConfig, population: Population, groups: int) -> list[list[Member]]:
    """Return the parents of each prompt, by the members with the highest PUCT scores.

    The prompts of an iteration take turns among the `top` members with the highest scores, each
    next to other ones, so that each member is expanded equally often. As in TTT-Discover, ancestors
    and descendants of a member are not among them, as far as there are enough other programs.
    """
    members = _eligible(config, population.members)
    if not members:
        return [[] for _ in range(groups)]
    index = {member.identity: number for number, member in enumerate(members)}
    scores = puct_scores(*_statistics(population, members, index), config.exploration)
    lineage = np.zeros((len(members), len(members)), bool)
    for identity, above in population.ancestors.items():
        for parent in above:
            if identity in index and parent in index:
                pair = index[identity], index[parent]
                lineage[pair] = lineage[pair[::-1]] = True
    chosen: list[int] = []
    available = np.ones(len(members), bool)
    for _ in range(min(config.top, len(members))):
        unrelated = available & ~lineage[chosen].any(axis=0)
        pool = unrelated if unrelated.any() else available
        number = int(np.argmax(np.where(pool, scores, -np.inf)))
        chosen.append(number)
        available[number] = False
    states = [members[number] for number in chosen]
    drawn = []
    for group in range(groups):
        turn, first = divmod(group, len(states))
        others = states[first + 1 :] + states[:first]
        shift = turn % len(others) if others else 0
        companions = (others[shift:] + others[:shift])[: config.programs - 1]
        drawn.append([states[first], *companions])
    return drawn


def puct_scores(
    rewards: np.ndarray,
    best_children: np.ndarray,
    visits: np.ndarray,
    total: int,
    exploration: float,
) -> np.ndarray:
    """Return the PUCT score of each state, as in TTT-Discover (arXiv 2601.16175).

    score(s) = Q(s) + c * scale * P(s) * sqrt(1 + T) / (1 + n(s)), where Q is the best reward among
    the children of s, or its own if it has none, P falls linearly with the rank of its reward, and
    scale is the range of the rewards.

    Args:
        rewards: reward of each state, [states] float64, in descending order.
        best_children: best reward among the children of each state, [states] float64; -inf without
            children.
        visits: number of expansions of each state or a descendant of it, [states].
        total: number of all expansions, T.
        exploration: the constant c.
    """
    quality = np.where(np.isneginf(best_children), rewards, best_children)
    prior = np.arange(len(rewards), 0, -1.0)
    prior /= prior.sum()
    scale = rewards.max() - rewards.min()
    return quality + exploration * scale * prior * np.sqrt(1.0 + total) / (1.0 + visits)


def _eligible(config: MemoryConfig, members: Sequence[Member]) -> list[Member]:
    """Return the members that may be parents: those of the archive, or one for each structure."""
    key = operator.attrgetter("cell" if config.archive else "structure")
    chosen = one_per(members, key, config.programs)
    order = {member.identity: rank for rank, member in enumerate(members)}
    return sorted(chosen, key=lambda member: order[member.identity])


def _statistics(
    population: Population, members: Sequence[Member], index: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return rewards, best rewards of children, visits, and the number of all expansions."""
    rewards = np.array([member.score for member in members])
    scores = {member.identity: member.score for member in population.members}
    best_children = np.full(len(members), -np.inf)
    visits = np.zeros(len(members))
    expansions = {(one.round, one.group): one.parents for one in population.trials if one.parents}
    for parents in expansions.values():
        visits += _expanded(population, parents, index)
    for trial in population.trials:
        if trial.identity in scores:
            for parent in trial.parents:
                if parent in index and parent != trial.identity:
                    number = index[parent]
                    best_children[number] = max(best_children[number], scores[trial.identity])
    return rewards, best_children, visits, len(expansions)


def _expanded(population: Population, parents: Sequence[str], index: dict[str, int]) -> np.ndarray:
    """Return 1 for each state that an expansion of these parents counts for, else 0."""
    above = (population.ancestors.get(parent, frozenset()) for parent in parents)
    counts = np.zeros(len(index))
    counts[[index[name] for name in {*parents}.union(*above) if name in index]] = 1
    return counts
