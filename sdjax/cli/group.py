"""Code shared by all commands: argument types and exit statuses."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from sdjax.cli.interrupts import INTERRUPTED, Interrupted, running_command
from sdjax.core.errors import UserError
from sdjax.core.logging import configure_logging
from sdjax.core.storage_errors import DISK_FAULTS, file_of, storage_errno, storage_reason
from sdjax.core.visible import escape

CLOSED_PIPE = 141  # exit status, as of a program that SIGPIPE ends
# Modules that write to standard output or standard error, in addition to click and rich.
_WRITERS = (__name__, "sdjax.core.logging")

FOLDER_PATH = click.Path(path_type=Path, file_okay=False)
FILE_PATH = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path)


class Group(click.Group):
    """A command group that exits with 2 on a user error (one line) and with 130 on an interrupt."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, which the first Ctrl-C or SIGTERM interrupts."""
        with running_command():
            try:
                return super().invoke(ctx)
            except BrokenPipeError as error:  # click would exit with 1, as after a refusal
                _exit(*exit_status(error))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; print an error, if any, and exit with its status."""
        configure_logging()
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
            return result
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except click.Abort as error:  # what click makes of an EOFError
            _exit(*exit_status(error.__cause__ or error))
        except Exception as error:
            _exit(*exit_status(error))


def exit_status(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message for an exception that ended a command."""
    if isinstance(error, Interrupted):
        return INTERRUPTED, f"sdjax: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "sdjax: interrupted"
    if isinstance(error, UserError):
        return 2, f"sdjax: {error}"
    from_output = isinstance(error, OSError) and _is_output_error(error)
    if from_output and isinstance(error, BrokenPipeError):
        return CLOSED_PIPE, ""
    where = "the output" if from_output else file_of(error)
    is_expected = from_output or storage_errno(error) in DISK_FAULTS
    if where and is_expected and (reason := storage_reason(error)):
        return 2, f"sdjax: {where}: {reason} and run the same command again"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def _exit(status: int, message: str) -> NoReturn:
    if message:
        # On a terminal, replace the `^C` that it has printed.
        start = "\r\x1b[K" if status == INTERRUPTED and sys.stderr.isatty() else ""
        click.echo(start + escape(message), err=True)
    sys.exit(status)


def _is_output_error(error: OSError) -> bool:
    """Return whether writing to standard output or to standard error failed."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals["__name__"] if frames else ""
    return module.split(".")[0] in ("click", "rich") or module in _WRITERS


def echo(text: str, *, err: bool = False) -> None:
    """Print a text, whose control characters and bidirectional marks are replaced by codes.

    All commands print with this function, since any text may contain what others have written.

    Args:
        text: the text.
        err: whether to print to standard error.
    """
    click.echo(escape(text), err=err)


def examples(*commands: str) -> str:
    """Return the epilog of a command's `--help`: example command lines."""
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)
