"""User errors that quote what a file from someone else contains."""

import pytest

from sdjax.core.errors import MAX_MESSAGE, UserError


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
