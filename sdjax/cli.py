"""The command line: one command a job."""

from __future__ import annotations

import click

from sdjax import __version__
from sdjax.commands.evaluation import evaluate
from sdjax.commands.merging import merge, methods
from sdjax.commands.sandbox import check
from sdjax.commands.search import demo, report, run
from sdjax.commands.shared import Group
from sdjax.commands.training import train
from sdjax.commands.zoo import zoo_group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdjax")
def main() -> None:
    """Language models that invent algorithms to improve language models."""


for command in (demo, run, report, merge, evaluate, check, train, zoo_group, methods):
    main.add_command(command)
