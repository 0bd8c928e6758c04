"""Policies that draw the parents of prompts."""

import dataclasses
import math
import random

import numpy as np
import pytest

from sdjax.search.memory.parents import draw_parents, island_members, puct_scores
from sdjax.search.memory.population import Member, Population, Trial, one_per
from sdjax.search.memory_config import MemoryConfig

KEY = (1, 2)
POLICIES = ("top", "islands", "puct")


def member(identity, score, *, structure=None, families=(), change=0.6):
    return Member(
        identity=identity,
        structure=structure or f"structure {identity}",
        source=f"def {identity}",
        score=score,
        change=change,
        families=families,
    )


def trial(number, group, identity, parents=()):
    return Trial(round=number, group=group, parents=tuple(parents), identity=identity)


def names(drawn):
    return [[one.identity for one in parents] for parents in drawn]


def random_population(rng):
    """Return three rounds, whose programs have parents of the round before, with ties."""
    trials, members, earlier = [], {}, []
    for number in (1, 2, 3):
        written = []
        for group in range(8):
            parents = rng.sample(earlier, min(2, len(earlier)))
            name = rng.choice([None, f"p{rng.randrange(30)}"])
            if name is not None:
                members.setdefault(
                    name,
                    member(name, rng.randrange(6) / 6, structure=f"s{rng.randrange(12)}"),
                )
                written.append(name)
            trials.append(trial(number, group, name, parents))
        earlier = sorted({*earlier, *written})
    return list(members.values()), trials


@pytest.mark.parametrize("parents", POLICIES)
def test_parents_do_not_depend_on_any_order(parents):
    rng = random.Random(0)
    for archive in (False, True):
        config = MemoryConfig(parents=parents, archive=archive, top=4, islands=2, migration=1)
        members, trials = random_population(rng)
        expected = names(draw_parents(config, Population.of(members, trials), 12, KEY))
        rng.shuffle(members)
        rng.shuffle(trials)
        population = Population.of(members, trials)
        assert names(draw_parents(config, population, 12, KEY)) == expected
        assert names(draw_parents(config, population, 5, KEY)) == expected[:5]
        for drawn in draw_parents(config, population, 12, KEY):
            assert [one.score for one in drawn] == sorted(one.score for one in drawn)
            assert len({one.structure for one in drawn}) == len(drawn) <= config.programs


@pytest.mark.parametrize("parents", POLICIES)
def test_without_programs_there_are_no_parents(parents):
    config, population = MemoryConfig(parents=parents), Population.of((), [trial(1, 0, None)])
    assert draw_parents(config, population, 3, KEY) == [(), (), ()]


def test_better_programs_are_drawn_more_often_and_only_the_best():
    population = Population.of([member(f"p{n}", n / 10) for n in range(8)], ())
    drawn = names(draw_parents(MemoryConfig(top=4), population, 2000, KEY))
    counts = {name: sum(name in parents for parents in drawn) for name in ("p7", "p6", "p5", "p4")}
    assert sum(counts.values()) == 4000
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    alone = MemoryConfig(programs=1, top=4)
    first = [name for (name,) in names(draw_parents(alone, population, 2000, KEY))]
    assert first.count("p7") / 2000 == pytest.approx(4 / 10, abs=0.04)
    assert first.count("p4") / 2000 == pytest.approx(1 / 10, abs=0.04)


def test_one_structure_is_shown_twice_only_if_there_are_no_others():
    same = [member(name, score, structure="s") for name, score in (("a", 0.5), ("b", 0.7))]
    config = MemoryConfig()
    (drawn,) = names(draw_parents(config, Population.of(same, ()), 1, KEY))
    assert drawn == ["a", "b"]
    other = Population.of([*same, member("c", 0.1)], ())
    assert all(parents == ["c", "b"] for parents in names(draw_parents(config, other, 20, KEY)))


def test_archive_keeps_the_best_program_of_each_kind():
    members = [
        member("clip", 0.9, families=("clip", "mean")),
        member("clip again", 0.8, families=("mean", "clip")),
        member("large clip", 0.5, families=("clip", "mean"), change=1.2),
        member("ramp", 0.4, families=("depth_ramp",)),
        member("ramp again", 0.3, families=("depth_ramp",)),
    ]
    cells = one_per(members, lambda one: one.cell, 2)
    assert [one.identity for one in cells] == ["clip", "large clip", "ramp"]
    assert len(one_per(members, lambda one: one.cell, 4)) == 4
    population = Population.of(members, ())
    for parents in POLICIES[::2]:
        config = MemoryConfig(parents=parents, archive=True)
        shown = {
            name for drawn in names(draw_parents(config, population, 50, KEY)) for name in drawn
        }
        assert shown == {"clip", "large clip", "ramp"}


def test_prompts_of_an_island_show_its_own_programs_and_migrants():
    config = MemoryConfig(parents="islands", islands=3, migration=2)
    members = [
        member(name, score) for name, score in zip("abcdef", (6, 5, 4, 3, 2, 1), strict=True)
    ]
    first = [trial(1, group, name) for group, name in enumerate("abcde")]
    population = Population.of(members, first)
    islands = [[one.identity for one in island] for island in island_members(config, population)]
    assert islands == [["a", "d"], ["b", "e"], ["c"]]
    drawn = names(draw_parents(config, population, 6, KEY))
    assert drawn == [["d", "a"], ["e", "b"], ["c"]] * 2
    migrated = Population.of(members, [*first, trial(2, 2, "f")])
    islands = [[one.identity for one in island] for island in island_members(config, migrated)]
    assert islands == [["a", "c", "d"], ["a", "b", "e"], ["b", "c", "f"]]


def test_puct_scores_equal_the_formula():
    rewards = np.array([0.8, 0.6, 0.2])
    scores = puct_scores(
        rewards, np.array([0.7, -np.inf, 0.5]), visits=np.array([3, 0, 1]), total=4, exploration=0.5
    )
    bonus = 0.5 * (0.8 - 0.2) * math.sqrt(5)
    expected = [0.7 + bonus * 3 / 6 / 4, 0.6 + bonus * 2 / 6 / 1, 0.5 + bonus * 1 / 6 / 2]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_puct_counts_expansions_of_descendants_and_the_best_children():
    """By hand: "a" wrote "b" (better) and a refused program, "b" wrote "c" (worse)."""
    members = [member("a", 0.5), member("b", 0.7), member("c", 0.1)]
    trials = [
        trial(1, 0, "a"),
        trial(2, 0, "b", ["a"]),
        trial(2, 1, None, ["a"]),
        trial(3, 0, "c", ["b"]),
        trial(3, 0, "a", ["b"]),  # a second sample of the same prompt repeats "a"
    ]
    population = Population.of(members, trials)
    assert population.ancestors["c"] == {"a", "b"}
    assert population.ancestors["a"] == set()
    # In the order of the scores b, a, c: the best children, the visits and the prior.
    score = {
        "b": 0.5 + 0.6 * (3 / 6) * math.sqrt(1 + 3) / (1 + 1),
        "a": 0.7 + 0.6 * (2 / 6) * math.sqrt(1 + 3) / (1 + 3),
        "c": 0.1 + 0.6 * (1 / 6) * math.sqrt(1 + 3) / (1 + 0),
    }
    first, second, third = sorted(score, key=score.__getitem__, reverse=True)
    assert (first, second, third) == ("b", "a", "c")
    config = MemoryConfig(parents="puct", programs=1, top=2)
    assert names(draw_parents(config, population, 3, KEY)) == [["b"], ["a"], ["b"]]
    less = dataclasses.replace(config, exploration=0.1)
    assert names(draw_parents(less, population, 3, KEY)) == [["a"], ["b"], ["a"]]


def test_puct_shows_each_program_equally_often_and_in_all_pairs():
    population = Population.of([member(name, score) for score, name in enumerate("abcdef")], ())
    config = MemoryConfig(parents="puct", top=4)
    drawn = names(draw_parents(config, population, 12, KEY))
    counts = {name: sum(name in parents for parents in drawn) for name in "abcdef"}
    assert counts == {"f": 6, "e": 6, "d": 6, "c": 6, "b": 0, "a": 0}
    assert len({frozenset(parents) for parents in drawn}) == 6


def test_puct_shows_relatives_together_only_if_there_are_no_others():
    members = [member("a", 0.9), member("child", 0.8), member("other", 0.1)]
    trials = [trial(1, 0, "a"), trial(1, 1, "other"), trial(2, 0, "child", ["a"])]
    config = MemoryConfig(parents="puct", exploration=0.0, top=2)
    (drawn,) = names(draw_parents(config, Population.of(members, trials), 1, KEY))
    assert drawn == ["other", "a"] or drawn == ["other", "child"]
    (drawn,) = names(draw_parents(config, Population.of(members[:2], trials), 1, KEY))
    assert drawn == ["child", "a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top": 1}, r"top \(1\) must be at least programs \(2\)"),
        ({"operations": {"improve": 0}}, "positive frequency"),
        ({"programs": 1, "operations": {"combine": 1}}, "needs two programs"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)
    assert dataclasses.asdict(MemoryConfig(parents="puct"))["programs"] == 2
