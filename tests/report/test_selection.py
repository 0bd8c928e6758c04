"""By how much the development score of the best program is too high."""

import numpy as np
import pytest

from sdjax.report.selection import overestimate_by_halves, read_selection
from sdjax.search.ranking import winners_so_far


def test_equal_programs_are_overestimated_more_the_more_are_tried():
    rng = np.random.default_rng(1)
    solved = rng.random((64, 200)) < 0.5  # all solve half of the problems
    everything = np.ones_like(solved)
    found = overestimate_by_halves(solved, everything, [1, 8, 64])
    assert abs(found[1]) < 0.02
    assert found[1] < found[8] < found[64]
    # The expected maximum of 64 normal variables is 2.4 standard deviations, and each half has 100
    # problems. The two halves of one program are not independent of the selection by both.
    assert found[64] == pytest.approx(2.4 * 0.05, abs=0.04)


def test_better_program_is_not_overestimated():
    solved = np.zeros((16, 100), bool)
    solved[:, ::2] = True
    solved[5] = True
    found = overestimate_by_halves(solved, np.ones_like(solved), [16])
    assert found == {16: 0.0}


def test_program_that_stopped_early_does_not_win():
    solved = np.ones((2, 40), bool)
    solved[0, ::4] = False  # 75 % of all problems
    answered = np.ones_like(solved)
    answered[1, 4:] = False  # 4 of 4
    solved[1, 4:] = False
    (found,) = overestimate_by_halves(solved, answered, [2]).values()
    assert found != 0  # the first program: the halves differ, unlike those of the second
    assert abs(found) < 0.25


def test_best_so_far_is_compared_with_other_problems(finished):
    selection = read_selection(finished, "strict")
    programs = [one for one in finished.summaries("development") if one.entry[:7] == "program"]
    winners = winners_so_far(finished, "strict")
    assert list(winners) == [1, 2, 4, 8, 16, 32, 64, len(programs)]
    assert winners[8] == max(programs[:8], key=lambda one: one.strict).entry
    last = selection.bests[-1]
    test = {one.entry: one.strict for one in finished.summaries("test")}
    assert last.minus_test.mean == pytest.approx(last.development - test[last.name])
    assert last.minus_confirmation is None
    assert list(selection.halves) == list(winners)


def test_unscored_run_has_no_estimates(made_up, tmp_path):
    with made_up.new_store(tmp_path) as store:
        selection = read_selection(store, "strict")
    assert (selection.bests, selection.halves) == ((), {})
