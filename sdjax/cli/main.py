"""The `sdjax` command, which has one subcommand per file of this package."""

from __future__ import annotations

import click

from sdjax import __version__
from sdjax.cli.check import check
from sdjax.cli.demo import demo
from sdjax.cli.eval import evaluate
from sdjax.cli.extract_lora import extract_lora
from sdjax.cli.generate import generate
from sdjax.cli.group import Group
from sdjax.cli.merge import merge
from sdjax.cli.merge_lora import merge_lora
from sdjax.cli.methods import methods
from sdjax.cli.report import report
from sdjax.cli.run import run
from sdjax.cli.stats import stats
from sdjax.cli.train import train
from sdjax.cli.transfer import transfer
from sdjax.cli.tune import tune
from sdjax.cli.zoo import zoo_group
from sdjax.core.logging import configure_logging


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdjax")
def main() -> None:
    """Language models that invent algorithms to improve language models."""
    configure_logging()


for command in (
    demo,
    run,
    report,
    merge,
    transfer,
    evaluate,
    generate,
    check,
    train,
    tune,
    stats,
    extract_lora,
    merge_lora,
    zoo_group,
    methods,
):
    main.add_command(command)
