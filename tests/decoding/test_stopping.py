import pytest

from sdjax.core.errors import UserError
from sdjax.decoding.stopping import StopStrings


def test_empty_stop_string_raises_user_error():
    with pytest.raises(UserError, match="must not be empty"):
        StopStrings(strings=("a", ""), decode=str)


def test_truncation_keeps_the_token_that_completes_the_stop_string():
    words = ["ab", "cd", "ef"]
    stop = StopStrings(strings=("x", "bc"), decode=lambda tokens: "".join(words[t] for t in tokens))
    assert stop.truncate([0, 1, 2]) == (2, "a", True)
    assert stop.truncate([1, 2]) == (2, "cdef", False)
