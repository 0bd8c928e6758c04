"""`sdjax train`."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from sdjax.cli.group import FILE_PATH, Interrupted, examples, raise_interrupt


@click.command(epilog=examples("sdjax train dpo configs/train-dpo.yaml"))
@click.argument("kind", type=click.Choice(["sft", "dpo", "warmstart"]))
@click.argument("config", type=FILE_PATH)
def train(kind: str, config: Path) -> None:
    """Fine-tune a model as CONFIG says; called again, an interrupted training goes on.

    KIND is sft (texts), dpo (preferences), or warmstart (programs in the algorithm API, which a
    generator is to write).
    """
    from sdjax.search.pairs import preferences_of_run
    from sdjax.sharding.multihost import start_distributed
    from sdjax.training.job import train_model

    def say(line: str) -> None:
        click.echo(f"sdjax: {line}", err=True)

    start_distributed()
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        click.echo(train_model(kind, config, read_run=preferences_of_run, say=say))
    except KeyboardInterrupt:
        raise Interrupted(f"go on with: sdjax train {kind} {config}") from None
