"""The rules on statuses and duplicates."""

from sdjax.sandbox.verdict import DuplicateIndex, is_admissible


def test_duplicates_by_identity_or_by_outputs():
    index = DuplicateIndex()
    assert index.add("A", "f", "A") is None
    assert index.add("A", None, "A") == "A"
    assert index.add("B", "f", "B") == "A"
    assert index.add("B", None, "B") == "A"
    assert index.find("B") == "A"
    assert index.find("C") is None
    assert index.add("C", None, "C") is None


def test_admissible_statuses():
    statuses = ("admitted", "duplicate", "refused", "no program", "not judged", "non-finite")
    assert [s for s in statuses if is_admissible(s)] == ["admitted", "duplicate"]
