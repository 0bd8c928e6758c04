"""The ranking rules."""

from sdjax.search.ranking import best_by_group, ranked


def test_ranked_is_best_first_with_ties_by_name():
    assert ranked({"b": 0.5, "c": 0.7, "a": 0.5}) == ["c", "a", "b"]


def test_best_of_each_group():
    groups = [("paper", "x"), ("paper", "b"), ("paper", "a"), ("fine", "a"), ("fine", "none")]
    scores = {"x": 0.1, "a": 0.5, "b": 0.5}
    assert best_by_group(groups, scores) == {"paper": "a", "fine": "a"}
