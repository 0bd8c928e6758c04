"""Recognition and wording of storage errors."""

import errno
import sqlite3

import pytest

from sdjax.core.errors import TransientError, UserError
from sdjax.core.storage_errors import storage_errno, storage_errors


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ValueError("write failed: No space left on device"), errno.ENOSPC),
        (OSError(errno.EROFS, "read-only"), errno.EROFS),
        (OSError(errno.ECONNRESET, "network"), None),
        (ValueError("a bug"), None),
    ],
)
def test_storage_errors_are_told_from_others(error, number):
    assert storage_errno(error) == number


def raised_after(first, second, *, cause):
    """Return an exception that was raised while another one was handled."""
    second.__context__ = first
    second.__cause__ = first if cause else None
    return second


@pytest.mark.parametrize("cause", [True, False])
def test_causes_of_an_error_are_recognized(cause):
    error = raised_after(OSError(errno.EDQUOT, "quota"), RuntimeError("not saved"), cause=cause)
    assert storage_errno(error) == errno.EDQUOT


def test_bug_after_a_missing_file_is_not_a_storage_error():
    error = raised_after(OSError(errno.ENOENT, "missing"), KeyError("bug"), cause=False)
    assert storage_errno(error) is None


def test_database_on_a_full_disk_is_recognized():
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.executescript("CREATE TABLE a (x); CREATE TABLE b (x); CREATE TABLE c (x);")
    assert storage_errno(caught.value) == errno.ENOSPC


def test_message_names_the_file_and_what_to_do(tmp_path):
    with (
        pytest.raises(TransientError, match=r"missing/file: no such file.* and try again"),
        storage_errors(tmp_path, then="try again"),
    ):
        (tmp_path / "missing" / "file").write_text("content")


def test_hidden_name_is_replaced_by_the_final_one(tmp_path):
    with (
        pytest.raises(TransientError, match=r"^\S*/out: no such file"),
        storage_errors(tmp_path / "out"),
    ):
        (tmp_path / "missing" / ".out.partial").write_text("content")


def test_other_errors_pass_unchanged():
    for error in (UserError("No space left on device"), ValueError("a bug")):
        with pytest.raises(type(error)) as caught, storage_errors("out"):
            raise error
        assert caught.value is error
