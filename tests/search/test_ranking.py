"""The ranking rules."""

from sdjax.search.ranking import DuplicateIndex, best_by_group, is_admissible, ranked


def test_ranked_is_best_first_with_ties_by_name():
    assert ranked({"b": 0.5, "c": 0.7, "a": 0.5}) == ["c", "a", "b"]


def test_best_of_each_group():
    groups = [("paper", "x"), ("paper", "b"), ("paper", "a"), ("fine", "a"), ("fine", "none")]
    scores = {"x": 0.1, "a": 0.5, "b": 0.5}
    assert best_by_group(groups, scores) == {"paper": "a", "fine": "a"}


def test_duplicates_by_identity_or_by_outputs():
    index = DuplicateIndex()
    assert index.add("A", "f") is None
    assert index.add("A", None) == "A"
    assert index.add("B", "f") == "A"
    assert index.add("B", None) == "A"
    assert index.add("C", None) is None


def test_admissible_statuses():
    statuses = ("admitted", "duplicate", "refused", "no program", "not judged", "non-finite")
    assert [s for s in statuses if is_admissible(s)] == ["admitted", "duplicate"]
