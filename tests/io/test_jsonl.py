import pytest

from sdjax.core.errors import UserError
from sdjax.io.jsonl import read_jsonl


def test_lines_are_numbered_from_one_without_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "\\ud83d\\ude00"}\n\n{"a": 2, "b": 3}\n', encoding="utf-8")
    assert read_jsonl(path, ("a",)) == [(1, {"a": "\U0001f600"}), (3, {"a": 2, "b": 3})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1, 2]", "line 2: needs the fields a; found: not an object"),
        ('{"b": 1}', "line 2: needs the fields a; found: b"),
        ('{"a": "\\ud800"}', "line 2: contains half of a surrogate pair"),
    ],
)
def test_invalid_line_raises_user_error_with_line_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_jsonl(path, ("a",))
