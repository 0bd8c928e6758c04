import dataclasses
import random
from collections import Counter

import numpy as np
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


@pytest.mark.parametrize("case", range(100))
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


def faulty(rng, iteration, size):
    """Return samples with and without faults; some repeat the text of another one."""
    samples = scored(rng, population(rng, iteration, size))
    faults = [None, None, "refused", "duplicate", "unchanged"]
    return [
        dataclasses.replace(
            one,
            fault=(fault := rng.choice(faults)),
            identity="" if fault == "refused" else one.identity,
            text=rng.choice([one.text, f"{fault} {one.number}"]),
            prompt=f"prompt {rng.randrange(4)}",
        )
        for one in samples
    ]


RULES = [
    {},
    {"within_prompt": True},
    {"max_pairs_per_chosen": 2},
    {"max_pairs_per_rejected": 1, "within_prompt": True},
    {"min_percentile": 60.0, "max_pairs_per_chosen": 1, "max_pairs": 7},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("case", range(8))
def test_pair_rules_hold_for_random_samples_with_faults(case, rules):
    rng = random.Random(case)
    earlier = [faulty(rng, t, rng.randrange(0, 30)) for t in (1, 2)]
    current = faulty(rng, 3, rng.randrange(0, 60))
    config = SelectionConfig(
        chosen_percent=50, rejected_percent=50, elites=1, min_change=0.1, min_gap=0.1, **rules
    )
    pairs = make_pairs(current, earlier, config, key=case)

    scores = [one.score for one in rank_samples(current)]
    for pair in pairs:
        assert pair.chosen.fault is None
        assert pair.chosen.change >= 0.1
        assert pair.chosen.identity != pair.rejected.identity
        assert pair.rejected.fault or pair.chosen.score - pair.rejected.score >= 0.1 - 1e-9
        if config.within_prompt:
            assert pair.chosen.prompt == pair.rejected.prompt
        if config.min_percentile:
            assert pair.chosen.score >= np.percentile(scores, 60) - 1e-12
    assert len(set(pairs)) == len(pairs)
    chosen = {(pair.chosen.prompt, pair.chosen.text) for pair in pairs}
    losers = {(p.rejected.prompt, p.rejected.text) for p in pairs if p.rejected.fault}
    assert not chosen & losers
    if not rules and rank_samples(current) and pairs:
        # every sample with a fault is rejected, once per text, unless its program or text is chosen
        identities = {pair.chosen.identity for pair in pairs}
        for one in current:
            if one.fault and one.identity not in identities:
                assert (one.prompt, one.text) in losers | chosen
    for side, limit in (
        ("chosen", config.max_pairs_per_chosen),
        ("rejected", config.max_pairs_per_rejected),
    ):
        sides = (getattr(pair, side) for pair in pairs)
        uses = Counter((one.identity, one.fault and one.text) for one in sides)
        assert max(uses.values(), default=0) <= (limit or len(pairs))
    assert len(pairs) <= (config.max_pairs or len(pairs))

    rng.shuffle(current)
    for samples in earlier:
        rng.shuffle(samples)
    assert make_pairs(current, earlier, config, key=case) == pairs


def refused(number, *, prompt="prompt 1"):
    one = program("", 0.0, number=number)
    return dataclasses.replace(one, prompt=prompt, text=f"1 + {number}", fault="refused")


def test_one_program_is_chosen_over_refused_samples():
    samples = [program("a", 0.4), refused(1), refused(2)]
    pairs = make_pairs(samples, [], CONFIG, key=0)
    assert [pair.rejected.number for pair in pairs] == [1, 2]
    assert make_pairs(samples[:1], [], CONFIG, key=0) == ()
    assert make_pairs(samples[1:], [], CONFIG, key=0) == ()


def test_better_half_of_a_prompt_is_paired_with_its_worse_half_and_failures_as_in_evotune():
    config = SelectionConfig(
        chosen_percent=50,
        rejected_percent=50,
        elites=0,
        within_prompt=True,
        max_pairs_per_rejected=1,
    )
    first = [program(f"p{n}", n / 10, number=n) for n in range(4)]
    second = [
        dataclasses.replace(program(f"q{n}", 0.5 + n / 10, number=10 + n), prompt="prompt 2")
        for n in range(4)
    ]
    failures = [refused(20), refused(21), refused(22, prompt="prompt 2")]
    pairs = make_pairs([*first, *second, *failures], [], config, key=0)
    assert {pair.chosen.identity for pair in pairs} <= {"p2", "p3", "q2", "q3"}
    assert sorted(pair.rejected.number for pair in pairs) == [0, 1, 10, 11, 20, 21, 22]
    assert {(pair.chosen.prompt, pair.rejected.prompt) for pair in pairs} == {
        ("prompt 1", "prompt 1"),
        ("prompt 2", "prompt 2"),
    }
