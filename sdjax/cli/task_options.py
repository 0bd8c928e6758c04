"""Options that choose a task and the form of its prompts, shared by the commands that decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from sdjax.cli.group import ANY_PATH

Command = TypeVar("Command", bound=Callable)


def task_options(*, default: str | None) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of a task to a command.

    They are --task, --data, --shots, --chat and --max-new-tokens.

    Args:
        default: the default of --task; None if it depends on other arguments.
    """
    tasks = "arithmetic, gsm8k, math, svamp, a JSONL file, or module:Class with --trust-code."
    shown = "" if default else "  [default: arithmetic]"
    options = (
        click.option("--task", default=default, show_default=True, help=tasks + shown),
        click.option(
            "--data",
            type=ANY_PATH,
            help="File or folder with the problems.  "
            "[default of gsm8k, math, svamp: Hugging Face Hub]",
        ),
        click.option("--shots", type=click.IntRange(min=0), help="Number of worked examples."),
        click.option(
            "--chat", is_flag=True, help="Format prompts with the tokenizer's chat template."
        ),
        click.option(
            "--max-new-tokens", type=click.IntRange(min=1), help="Maximum tokens per answer."
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):  # click shows them in the order of decorators
            command = option(command)
        return command

    return add


accept_versions_option = click.option(
    "--accept-versions",
    is_flag=True,
    help="Resume although versions of packages differ; --out records it.",
)
