"""`sdjax methods`: list the merge methods."""

from __future__ import annotations

import click

from sdjax.cli.group import examples


@click.command(epilog=examples("sdjax methods"))
def methods() -> None:
    """List the human-designed merge methods with hyperparameters, defaults and formulas."""
    from rich.console import Console
    from rich.table import Table

    from sdjax.merging.methods.registry import methods as all_methods

    table = Table("method", "hyperparameters", "in a recipe", "formula", show_lines=True)
    for method in all_methods().values():
        schema, hyperparameters, in_recipe = method.schema, [], []
        for parameter in method.hyperparameters:
            name, default = parameter.name, parameter.default
            star = "*" if parameter.type == "per_expert" else ""
            hyperparameters.append(f"{name}{star}={default}")
            key = schema.recipe_key(name)
            if name in schema.required:
                in_recipe.append(f"{key} (required)")
            elif key != name or name in schema.defaults:
                in_recipe.append(f"{key}={schema.defaults.get(name, default)}")
        table.add_row(method.name, ", ".join(hyperparameters), ", ".join(in_recipe), method.formula)
    console = Console()
    # Do not wrap output to a file or a pipe.
    (console if console.is_terminal else Console(width=300)).print(table)
    click.echo(
        "* a number, or one per expert. Names and defaults in Python and in a search follow the "
        "papers (second column); in a recipe they follow mergekit (third column)."
    )
