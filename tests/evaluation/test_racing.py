"""Races between simulated candidates whose true accuracies are known."""

import numpy as np
import pytest

from sdjax.evaluation.racing import Race, race


def outcomes(accuracies, problems=640, seed=0):
    """Return one row of outcomes per candidate; all candidates find the same problems hard."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(size=problems)
    noise = rng.normal(scale=0.15, size=(len(accuracies), problems))
    return difficulty + noise < np.asarray(accuracies)[:, None]


def run_race(table, rules):
    names = [f"c{i}" for i in range(len(table))]
    answered = []

    def answer(name, count):
        answered.append((name, count))
        return table[int(name[1:]), :count]

    return race(names, answer, table.shape[1], rules), answered


@pytest.mark.parametrize(
    ("problems", "expected"),
    [(640, (40, 80, 160, 320, 640)), (200, (40, 80, 200)), (40, (40,)), (24, (24,))],
)
def test_rungs_double_up_to_all_problems(problems, expected):
    assert Race().rungs(problems) == expected


def test_each_candidate_answers_more_and_more_of_the_problems():
    table = outcomes(np.linspace(0.3, 0.9, 40))
    correct, answered = run_race(table, Race())
    for index, row in enumerate(table):
        assert correct[f"c{index}"] == tuple(row[: len(correct[f"c{index}"])])
        counts = [count for name, count in answered if name == f"c{index}"]
        assert counts == list(Race().rungs(640)[: len(counts)])
        assert counts[-1] == len(correct[f"c{index}"])


def test_race_of_many_keeps_the_best_at_a_quarter_of_the_evaluations():
    kept, used = [], []
    for seed in range(10):
        table = outcomes(np.random.default_rng(seed).beta(6, 3, size=150), seed=seed)
        correct, _ = run_race(table, Race())
        best = np.argsort(-table.mean(1), kind="stable")[:5]
        kept += [len(correct[f"c{index}"]) == table.shape[1] for index in best]
        used.append(sum(map(len, correct.values())) / table.size)
    assert np.mean(kept) >= 0.95
    assert np.mean(used) <= 0.25


def test_candidates_that_cannot_be_told_apart_are_all_evaluated():
    table = outcomes(np.full(20, 0.8))
    correct, _ = run_race(table, Race(z=3.0))
    assert all(len(row) == table.shape[1] for row in correct.values())


def test_result_does_not_depend_on_the_order_of_the_candidates():
    table = outcomes(np.linspace(0.3, 0.9, 30))
    correct, _ = run_race(table, Race())
    names = [f"c{i}" for i in range(30)]
    other = race(names[::-1], lambda name, n: table[int(name[1:]), :n], table.shape[1], Race())
    assert other == correct


def test_race_that_is_ended_completes_its_leaders():
    table, calls = outcomes(np.linspace(0.3, 0.9, 12), problems=80), iter(range(100))
    stopped = []
    correct = race(
        [f"c{i}" for i in range(12)],
        lambda name, count: table[int(name[1:]), :count],
        80,
        Race(first_rung=20, winners=2),
        on_stop=stopped.append,
        out_of_time=lambda: next(calls) == 16,  # in the second rung
    )
    complete = {name for name, row in correct.items() if len(row) == 80}
    assert len(complete) == 2
    assert complete <= {"c7", "c8", "c9", "c10", "c11"}
    # Those that stopped in the first rung have their results; the others are missing.
    assert sorted(stopped) == sorted(correct)
    assert len(complete) < len(correct) < 12
