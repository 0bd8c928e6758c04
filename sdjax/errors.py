"""The one exception for a user's mistake."""


class UserError(Exception):
    """What is wrong, where (file, key, tensor, line) and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


class Passing(UserError):
    """A full disk, a file system that is away: calling again may succeed, so that whatever is done
    already is kept."""
