"""Options of a search for the numbers of a merge, shared by the commands that tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable)

_OF_RUN = "  [default: the run's]"


def search_options(*, budget: str, of_run: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of a search to a command.

    They are --budget, --optimizer, --steps, --learning-rate and --starts.

    Args:
        budget: help text of --budget.
        of_run: whether the options have the settings of a run as defaults. They are then None
            unless they are given, and --budget is not required.
    """

    def option(name: str, default: Any, text: str, **details: Any) -> Callable[[Command], Command]:
        if of_run:
            return click.option(name, help=text + _OF_RUN, **details)
        return click.option(name, default=default, show_default=True, help=text, **details)

    gradient = "" if of_run else "gradient: by gradient, or refused. "
    options = (
        click.option("--budget", type=int, required=not of_run, metavar="N", help=budget),
        option(
            "--optimizer",
            "auto",
            "auto: by gradient if the task has training problems, in the numbers that have one, "
            f"and otherwise by CMA-ES. {gradient}cmaes: by CMA-ES only.",
            type=click.Choice(["auto", *(["gradient"] if gradient else []), "cmaes"]),
        ),
        option("--steps", 60, "Gradient steps per start.", type=click.IntRange(min=1)),
        option(
            "--learning-rate",
            0.02,
            "Of Adam, as a fraction of the distance between a number's bounds.",
            type=click.FloatRange(min=0, min_open=True),
        ),
        option(
            "--starts",
            1,
            "Searches from different values, which share the budget.",
            type=click.IntRange(min=1),
        ),
    )

    def add(command: Command) -> Command:
        for add_option in reversed(options):  # click shows them in the order of decorators
            command = add_option(command)
        return command

    return add
