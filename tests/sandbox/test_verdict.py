"""The rules on statuses and duplicates."""

from sdjax.sandbox.verdict import DuplicateIndex, is_admissible


def test_index_names_the_first_program_of_an_identity_and_of_a_fingerprint():
    index = DuplicateIndex()
    index.add("A", "f", "first")
    index.add("A", "f", "second")
    index.add("B", "f", "third")
    index.add("C", None, "fourth")
    assert [index.find(identity) for identity in "ABCD"] == ["first", "third", "fourth", None]
    assert [index.find_similar(value) for value in ("f", "g", None)] == ["first", None, None]


def test_admissible_statuses():
    statuses = ("admitted", "duplicate", "refused", "no program", "not judged", "non-finite")
    assert [s for s in statuses if is_admissible(s)] == ["admitted", "duplicate"]
