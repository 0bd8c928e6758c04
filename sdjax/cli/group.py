"""Code shared by all commands: argument types and exit statuses."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from sdjax.core.errors import UserError
from sdjax.core.logging import configure_logging

FOLDER_PATH = click.Path(path_type=Path, file_okay=False)
FILE_PATH = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path)


class Interrupted(click.ClickException):
    """A command interrupted by Ctrl-C or SIGTERM; the message says how to resume it."""

    exit_code = 130

    def format_message(self) -> str:
        """Return the message to print."""
        return f"interrupted; {self.message}"


class Group(click.Group):
    """A command group that exits with 2 on a user error (one line) and with 130 on an interrupt."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; print an error, if any, and exit with its status."""
        signal.signal(signal.SIGTERM, raise_interrupt)
        configure_logging()
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except (UserError, Interrupted, KeyboardInterrupt, click.Abort) as error:
            status, message = exit_status(error)
            click.echo(message, err=True)
            sys.exit(status)
        except click.ClickException as error:
            error.show()
            sys.exit(2)


def exit_status(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message for an exception that ended a command."""
    if isinstance(error, UserError):
        return 2, f"sdjax: {error}"
    if isinstance(error, Interrupted):
        return error.exit_code, f"sdjax: {error.format_message()}"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "sdjax: interrupted"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def raise_interrupt(signum: int, frame: object) -> NoReturn:
    """Handle SIGTERM in the same way as Ctrl-C."""
    raise KeyboardInterrupt


def examples(*commands: str) -> str:
    """Return the epilog of a command's `--help`: example command lines."""
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)
