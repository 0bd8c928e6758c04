"""User errors that quote what a file from someone else contains."""

import pytest

from sdjax.core.errors import MAX_MESSAGE, UserError, truncated_repr


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a.yaml: missing; add it", "a.yaml: missing; add it"),
        ("a: b\nc\r\nd\u2028e\x85f\n", "a: b c d e f"),
        ("x" * (MAX_MESSAGE + 1), f"{'x' * 666}…{'x' * 1333}"),
    ],
)
def test_message_is_one_line(message, shown):
    assert str(UserError(message)) == shown


def test_a_prefix_added_later_is_part_of_the_message():
    error = UserError("b")
    error.args = (f"a: {error}",)
    assert str(error) == "a: b"


@pytest.mark.parametrize(
    "value",
    [None, 1.5, "a'b", b"\n", [], (), {}, (1,), [1, (2, "x")], {"a": [1], 2: {}}, {1, 2}],
)
def test_a_short_repr_is_that_of_python(value):
    assert truncated_repr(value) == repr(value)


def nested(levels, width):
    """Return tuples whose repr has more than `width ** levels` characters."""
    value = "lol"
    for _ in range(levels):
        value = (value,) * width
    return value


recursive = []
recursive.append(recursive)


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 1_000, "'xxxx"),
        (nested(12, 10), "(((((((((((('lol', 'lol'"),
        ({"a": nested(12, 10)}, "{'a': (((("),
        (nested(20_000, 1), "(((("),
        (recursive, "[[[["),
        (1 << 10**6, "0x1000"),
    ],
    ids=["text", "wide", "in a dict", "deep", "recursive", "integer"],
)
def test_a_long_repr_is_cut_before_it_is_made(value, start):
    shown = truncated_repr(value, 50)
    assert len(shown) == 50
    assert shown.startswith(start)
    assert shown.endswith("…")
