import random

import pytest

from sdjax.search.pairs import PairSettings, Scored, make_pairs, quota, rank, select

SETTINGS = PairSettings(winners_percent=5, losers_percent=10, elites=3, min_gap=0.02)


def program(identity: str, score: float, *, iteration: int = 1, change: float = 1.0, number=0):
    return Scored(
        identity=identity,
        prompt=f"prompt {iteration}",
        text=f"def {identity}",
        score=score,
        change=change,
        iteration=iteration,
        number=number,
    )


def population(rng: random.Random, iteration: int, size: int) -> list[Scored]:
    """Programs with ties, duplicates and some that change nothing."""
    return [
        program(
            f"{iteration}-{rng.randrange(size)}",
            0.0,
            iteration=iteration,
            change=rng.choice([0.0, 0.5, 1.0]),
            number=number,
        )
        for number in range(size)
    ]


def scored(rng: random.Random, programs: list[Scored]) -> list[Scored]:
    """A program's score and change follow from its identity, as they do in a run."""
    facts = {p.identity: (rng.randrange(30) / 30, p.change) for p in programs}
    return [
        Scored(
            identity=p.identity,
            prompt=p.prompt,
            text=p.text,
            score=facts[p.identity][0],
            change=facts[p.identity][1],
            iteration=p.iteration,
            number=p.number,
        )
        for p in programs
    ]


@pytest.mark.parametrize("case", range(200))
def test_whatever_the_programs_the_rules_hold(case):
    rng = random.Random(case)
    earlier = [scored(rng, population(rng, t, rng.randrange(1, 60))) for t in (1, 2)]
    current = scored(rng, population(rng, 3, rng.randrange(0, 120)))
    cap = rng.choice([None, 0, 1, 5, 100])
    settings = PairSettings(
        winners_percent=rng.choice([1, 3, 20, 50]),
        losers_percent=rng.choice([1, 10, 50]),
        elites=rng.choice([0, 1, 3]),
        min_gap=rng.choice([0.0, 0.1]),
        min_change=0.1,
        max_pairs=cap,
    )
    selection = select(current, earlier, settings)
    pairs = make_pairs(selection, settings, key=case)

    winners = {p.identity for p in selection.winners}
    losers = {p.identity for p in selection.losers}
    assert not winners & losers
    assert len(winners) == len(selection.winners)
    assert len(losers) == len(selection.losers)
    assert all(p.change >= 0.1 for p in selection.winners)
    distinct = {p.identity for p in current}
    own = [p for p in selection.winners if p.iteration == 3]
    assert len(own) <= max(2, round(len(distinct) * settings.winners_percent / 100 + 0.01))
    if len(distinct) >= 4 and sum(p.change > 0 for p in rank(current)) >= 2:
        assert len(own) >= 2
        assert len(losers) >= 2
    for t in (1, 2):
        elites = [p for p in selection.winners if p.iteration == t]
        assert len(elites) <= settings.elites
        assert all(p.prompt == f"prompt {t}" for p in elites)
    for pair in pairs:
        assert pair.winner.identity in winners
        assert pair.loser.identity in losers
        assert pair.winner.score - pair.loser.score >= max(settings.min_gap - 1e-9, 1e-9)
    assert len({(p.winner.text, p.loser.text) for p in pairs}) == len(pairs)
    if cap is not None:
        assert len(pairs) <= cap

    # nothing depends on the order in which programs come
    rng.shuffle(current)
    for programs in earlier:
        rng.shuffle(programs)
    again = select(current, earlier, settings)
    assert again == selection
    assert make_pairs(again, settings, key=case) == pairs


def test_the_best_win_and_the_worst_lose():
    programs = [program(f"p{n:03}", n / 100) for n in range(100)]
    selection = select(programs, [], SETTINGS)
    assert [p.identity for p in selection.winners] == ["p099", "p098", "p097", "p096", "p095"]
    assert [p.identity for p in selection.losers] == [f"p{n:03}" for n in range(10)]
    assert len(make_pairs(selection, SETTINGS, key=0)) == 50


def test_percentages_are_of_distinct_programs():
    programs = [program(f"p{n % 50:03}", n % 50 / 100, number=n) for n in range(1000)]
    selection = select(programs, [], PairSettings(winners_percent=10, losers_percent=10))
    assert (len(selection.winners), len(selection.losers)) == (5, 5)


def test_ties_break_by_identity_and_the_first_text_stands():
    twins = [program("b", 0.5), program("a", 0.5), program("c", 0.7, number=4)]
    later = Scored(
        identity="c", prompt="prompt 1", text="other", score=0.7, change=1.0, iteration=1, number=9
    )
    ranked = rank([later, *twins])
    assert [p.identity for p in ranked] == ["c", "a", "b"]
    assert ranked[0].text == "def c"


def test_a_program_that_changes_nothing_never_wins_but_may_lose():
    programs = [program(f"p{n}", n / 10, change=0.0 if n in (0, 9) else 1.0) for n in range(10)]
    selection = select(programs, [], SETTINGS)
    assert [p.identity for p in selection.winners] == ["p8", "p7"]
    assert [p.identity for p in selection.losers] == ["p0", "p1"]
    idle = [program(f"q{n}", 0.9, iteration=0, change=0.0) for n in range(5)]
    assert select(programs, [idle], SETTINGS) == selection


def test_elites_join_with_their_own_prompt_and_are_no_losers():
    earlier = [program(f"e{n}", n / 10, iteration=1) for n in range(6)]
    current = [program(f"p{n}", n / 10, iteration=2) for n in range(6)]
    current.append(program("e5", 0.5, iteration=2, number=7))
    selection = select(current, [earlier], SETTINGS)
    elites = [p for p in selection.winners if p.prompt == "prompt 1"]
    assert {p.identity for p in elites} <= {"e5", "e4", "e3"}
    assert {"e4", "e3"} <= {p.identity for p in elites}
    assert sum(p.identity == "e5" for p in selection.winners) == 1


@pytest.mark.parametrize(
    ("size", "winners", "losers"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2)]
)
def test_few_programs_share_what_there_is(size, winners, losers):
    selection = select([program(f"p{n}", n / 10) for n in range(size)], [], SETTINGS)
    assert (len(selection.winners), len(selection.losers)) == (winners, losers)


def test_a_pair_needs_a_gap():
    programs = [program(f"p{n}", 0.5 + n / 100) for n in range(4)]
    selection = select(programs, [], SETTINGS)
    pairs = make_pairs(selection, PairSettings(min_gap=0.02), key=0)
    assert {(p.winner.identity, p.loser.identity) for p in pairs} == {
        ("p3", "p0"),
        ("p3", "p1"),
        ("p2", "p0"),
    }
    level = select([program(f"p{n}", 0.5) for n in range(9)], [], SETTINGS)
    assert make_pairs(level, PairSettings(min_gap=0.0), key=0) == ()


def test_the_cap_samples_by_key():
    programs = [program(f"p{n:03}", n / 200) for n in range(200)]
    settings = PairSettings(winners_percent=10, losers_percent=10, max_pairs=50)
    selection = select(programs, [], settings)
    whole = make_pairs(selection, PairSettings(), key=0)
    first, second = (make_pairs(selection, settings, key=key) for key in (1, 2))
    assert len(whole) == 400
    assert len(first) == len(second) == 50
    assert set(first) != set(second)
    assert set(first) | set(second) <= set(whole)
    # every winner has its chance: 50 of 400 pairs leave out hardly any of 20
    assert len({p.winner.identity for p in first}) > 14


def test_a_quota_is_rounded_and_bounded():
    assert quota(3000, 3, 1500) == 90
    assert quota(100, 3, 50) == 3
    assert quota(10, 3, 5) == 2
    assert quota(3, 50, 1) == 1
