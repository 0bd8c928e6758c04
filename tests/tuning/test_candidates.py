"""The two halves of the development problems."""

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.arithmetic import ArithmeticTask
from sdjax.tuning.candidates import split_development


def test_halves_are_disjoint_in_order_and_do_not_change():
    problems = ArithmeticTask().problems("development")
    first, second = split_development(problems)
    assert len(first) == len(second) == 320
    assert sorted([*first, *second], key=problems.index) == problems
    for half in (first, second):
        places = [problems.index(problem) for problem in half]
        assert places == sorted(places)
    # The order of the problems does not decide which half they are in.
    again, _ = split_development(problems[::-1])
    assert again == first[::-1]
    assert [problem.id for problem in first[:4]] == [
        "development-0",
        "development-2",
        "development-3",
        "development-4",
    ]


def test_fewer_than_two_problems_raise_user_error():
    problem = Problem(id="1", kind="sum", question="1+1=", answer="2")
    with pytest.raises(UserError, match="at least 2 development problems, not 1"):
        split_development([problem])
