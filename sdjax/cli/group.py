"""What all commands share: kinds of arguments, and how a command ends that fails."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path

import click

from sdjax.core.errors import UserError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER_OR_FILE = click.Path(path_type=Path)


class Interrupted(click.ClickException):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    exit_code = 130

    def format_message(self) -> str:
        return f"interrupted; {self.message}"


class Group(click.Group):
    """Prints a user's mistake as one line and exits with 2; an interruption with 130."""

    def main(self, *args, **kwargs):
        signal.signal(signal.SIGTERM, interrupt)
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except (UserError, Interrupted, KeyboardInterrupt, click.Abort) as error:
            status, line = ending(error)
            click.echo(line, err=True)
            sys.exit(status)
        except click.ClickException as error:
            error.show()
            sys.exit(2)


def ending(error: BaseException) -> tuple[int, str]:
    """Exit status and message of what ended a command."""
    if isinstance(error, UserError):
        return 2, f"sdjax: {error}"
    if isinstance(error, Interrupted):
        return error.exit_code, f"sdjax: {error.format_message()}"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "sdjax: interrupted"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def example(text: str) -> str:
    return f"\b\nExample:\n  {text}"
