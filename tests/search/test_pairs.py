import random

import pytest

from sdjax.search.pairs import all_pairs, make_pairs, quota, rank_samples, select, subsample
from sdjax.search.score_types import ScoredSample
from sdjax.search.selection_config import SelectionConfig

CONFIG = SelectionConfig(chosen_percent=5, rejected_percent=10, elites=3, min_gap=0.02)


def program(identity: str, score: float, *, iteration: int = 1, change: float = 1.0, number=0):
    return ScoredSample(
        identity=identity,
        prompt=f"prompt {iteration}",
        text=f"def {identity}",
        score=score,
        change=change,
        iteration=iteration,
        number=number,
    )


def population(rng: random.Random, iteration: int, size: int) -> list[ScoredSample]:
    """Return programs with ties, duplicates and some without effect."""
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


def scored(rng: random.Random, programs: list[ScoredSample]) -> list[ScoredSample]:
    """Return the programs with scores and changes that depend on the identity, as in a run."""
    scores_and_changes = {p.identity: (rng.randrange(30) / 30, p.change) for p in programs}
    return [
        ScoredSample(
            identity=p.identity,
            prompt=p.prompt,
            text=p.text,
            score=scores_and_changes[p.identity][0],
            change=scores_and_changes[p.identity][1],
            iteration=p.iteration,
            number=p.number,
        )
        for p in programs
    ]


@pytest.mark.parametrize("case", range(200))
def test_selection_rules_hold_for_random_populations(case):
    rng = random.Random(case)
    earlier = [scored(rng, population(rng, t, rng.randrange(1, 60))) for t in (1, 2)]
    current = scored(rng, population(rng, 3, rng.randrange(0, 120)))
    cap = rng.choice([None, 0, 1, 5, 100])
    config = SelectionConfig(
        chosen_percent=rng.choice([1, 3, 20, 50]),
        rejected_percent=rng.choice([1, 10, 50]),
        elites=rng.choice([0, 1, 3]),
        min_gap=rng.choice([0.0, 0.1]),
        min_change=0.1,
        max_pairs=cap,
    )
    selection = select(current, earlier, config)
    pairs = make_pairs(current, earlier, config, key=case)

    chosen = {p.identity for p in selection.chosen}
    rejected = {p.identity for p in selection.rejected}
    assert not chosen & rejected
    assert len(chosen) == len(selection.chosen)
    assert len(rejected) == len(selection.rejected)
    assert all(p.change >= 0.1 for p in selection.chosen)
    distinct = {p.identity for p in current}
    own = [p for p in selection.chosen if p.iteration == 3]
    assert len(own) <= max(2, round(len(distinct) * config.chosen_percent / 100 + 0.01))
    if len(distinct) >= 4 and sum(p.change > 0 for p in rank_samples(current)) >= 2:
        assert len(own) >= 2
        assert len(rejected) >= 2
    for t in (1, 2):
        elites = [p for p in selection.chosen if p.iteration == t]
        assert len(elites) <= config.elites
        assert all(p.prompt == f"prompt {t}" for p in elites)
    for pair in pairs:
        assert pair.chosen.identity in chosen
        assert pair.rejected.identity in rejected
        assert pair.chosen.score - pair.rejected.score >= max(config.min_gap - 1e-9, 1e-9)
    assert len({(p.chosen.text, p.rejected.text) for p in pairs}) == len(pairs)
    if cap is not None:
        assert len(pairs) <= cap

    # the order of the inputs does not matter
    rng.shuffle(current)
    for programs in earlier:
        rng.shuffle(programs)
    again = select(current, earlier, config)
    assert again == selection
    assert make_pairs(current, earlier, config, key=case) == pairs


def test_best_are_chosen_and_worst_rejected():
    programs = [program(f"p{n:03}", n / 100) for n in range(100)]
    selection = select(programs, [], CONFIG)
    assert [p.identity for p in selection.chosen] == ["p099", "p098", "p097", "p096", "p095"]
    assert [p.identity for p in selection.rejected] == [f"p{n:03}" for n in range(10)]
    assert len(make_pairs(programs, [], CONFIG, key=0)) == 50


def test_percentages_are_of_distinct_programs():
    programs = [program(f"p{n % 50:03}", n % 50 / 100, number=n) for n in range(1000)]
    selection = select(programs, [], SelectionConfig(chosen_percent=10, rejected_percent=10))
    assert (len(selection.chosen), len(selection.rejected)) == (5, 5)


def test_ties_break_by_identity_and_the_first_text_is_kept():
    twins = [program("b", 0.5), program("a", 0.5), program("c", 0.7, number=4)]
    later = ScoredSample(
        identity="c", prompt="prompt 1", text="later", score=0.7, change=1.0, iteration=1, number=9
    )
    ranked = rank_samples([later, *twins])
    assert [p.identity for p in ranked] == ["c", "a", "b"]
    assert ranked[0].text == "def c"


def test_program_without_effect_is_never_chosen_but_may_be_rejected():
    programs = [program(f"p{n}", n / 10, change=0.0 if n in (0, 9) else 1.0) for n in range(10)]
    selection = select(programs, [], CONFIG)
    assert [p.identity for p in selection.chosen] == ["p8", "p7"]
    assert [p.identity for p in selection.rejected] == ["p0", "p1"]
    idle = [program(f"q{n}", 0.9, iteration=0, change=0.0) for n in range(5)]
    assert select(programs, [idle], CONFIG) == selection


def test_elites_keep_their_prompt_and_are_not_rejected():
    earlier = [program(f"e{n}", n / 10, iteration=1) for n in range(6)]
    current = [program(f"p{n}", n / 10, iteration=2) for n in range(6)]
    current.append(program("e5", 0.5, iteration=2, number=7))
    selection = select(current, [earlier], CONFIG)
    elites = [p for p in selection.chosen if p.prompt == "prompt 1"]
    assert {p.identity for p in elites} <= {"e5", "e4", "e3"}
    assert {"e4", "e3"} <= {p.identity for p in elites}
    assert sum(p.identity == "e5" for p in selection.chosen) == 1


@pytest.mark.parametrize(
    ("size", "chosen", "rejected"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2)]
)
def test_selection_of_few_programs(size, chosen, rejected):
    selection = select([program(f"p{n}", n / 10) for n in range(size)], [], CONFIG)
    assert (len(selection.chosen), len(selection.rejected)) == (chosen, rejected)


def test_pairs_need_a_minimum_gap():
    programs = [program(f"p{n}", 0.5 + n / 100) for n in range(4)]
    selection = select(programs, [], CONFIG)
    pairs = all_pairs(selection, SelectionConfig(min_gap=0.02))
    assert {(p.chosen.identity, p.rejected.identity) for p in pairs} == {
        ("p3", "p0"),
        ("p3", "p1"),
        ("p2", "p0"),
    }
    level = select([program(f"p{n}", 0.5) for n in range(9)], [], CONFIG)
    assert all_pairs(level, SelectionConfig(min_gap=0.0)) == []


def test_max_pairs_subsamples_by_key():
    programs = [program(f"p{n:03}", n / 200) for n in range(200)]
    config = SelectionConfig(chosen_percent=10, rejected_percent=10, max_pairs=50)
    selection = select(programs, [], config)
    whole = all_pairs(selection, SelectionConfig())
    first, second = (subsample(whole, config, key=key) for key in (1, 2))
    assert len(whole) == 400
    assert len(first) == len(second) == 50
    assert set(first) != set(second)
    assert set(first) | set(second) <= set(whole)
    # 50 of 400 pairs contain most of the 20 chosen samples
    assert len({p.chosen.identity for p in first}) > 14


def test_quota_is_rounded_and_bounded():
    assert quota(3000, 3, 1500) == 90
    assert quota(100, 3, 50) == 3
    assert quota(10, 3, 5) == 2
    assert quota(3, 50, 1) == 1
