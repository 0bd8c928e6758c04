"""JSON that nests, expands or contains what cannot be written again."""

import re

import pytest

from sdjax.core.json import MAX_LEVELS, parse_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 column 2"),
        ("", "Expecting value: line 1"),
        ('"a\x00"', "Invalid control character at: line 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MAX_LEVELS + 1) + "]" * (MAX_LEVELS + 1), "nested too deeply; at most 100 levels"),
        ('{"a":' * (MAX_LEVELS + 1) + "1" + "}" * (MAX_LEVELS + 1), "at most 100 levels"),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "duplicate key 'a'"),
        ("9" * 5_000, "an integer of 5,000 digits"),
        ("-" + "9" * 400, "an integer of 401 digits"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e400", "the number 1e400 is too large"),
        ('"\\ud800"', "contains half of a surrogate pair"),
        ('{"\\uDC00": 1}', "contains half of a surrogate pair"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        ('"a"'.encode("utf-16"), "not UTF-8 at byte 0"),
    ],
)
def test_text_that_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_text_that_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -2.5, null, true]}') == {"a": [1, -2.5, None, True]}
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json("[" * MAX_LEVELS + "]" * MAX_LEVELS)
    assert parse_json("[Infinity, 1e400]", non_finite=True) == [float("inf")] * 2
